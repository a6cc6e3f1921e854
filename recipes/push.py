"""Push a finished run to the Hub, where anyone loads it with timm or transformers.

    python recipes/push.py runs/digits ORG/NAME

makes one commit of the run of recipes/train.py: weights (safetensors), config.json, a model card with the results and
pictures, the manifest of the images, metrics and settings. Some seconds, and what the upload takes. Then

    timm.create_model("hf-hub:ORG/NAME", pretrained=True)        # after `import timm_deq`

gives the model, anywhere. Log in with `hf auth login`, or set HF_TOKEN. The repository is created if it is not there
(`--private`: for its owners alone). The same run pushed again changes nothing; after a change, what has changed is
sent. A push that fails leaves the repository as it was, and says why in one line.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.errors import exit_code
from recipes.settings.flags import Parser


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: run(read_flags(argv)))


def read_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; --help prints and exits.

    Raises:
        UserError: an unknown flag.
    """
    parser = Parser(prog="python recipes/push.py", description="Push a finished run to the Hub.", allow_abbrev=False)
    flag = parser.add_argument
    flag("run", metavar="RUN", help="folder of a run of recipes/train.py that has finished")
    flag("repo", metavar="ORG/NAME", help="repository; created if it is not there")
    flag("--revision", metavar="BRANCH", help="branch; created from main if it is not there (default: main)")
    flag("--private", action="store_true", help="create a repository for its owners alone")
    flag("--message", help="title of the commit")
    flag("--overwrite", action="store_true", help="replace a model of another architecture")
    flag("--push-states", action="store_true", help="push the checkpoints for --resume too")
    flag("--evaluation", metavar="FOLDER", help="output of recipes/evaluate.py: its anytime curve goes into the card")
    flag("--license", help="of the weights, as the Hub names it (default: apache-2.0)")
    flag("--twin", metavar="ORG/NAME", help="repository of the explicit twin, or of the equilibrium model of a twin")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Push a run and say where it is."""
    # Imported after the command line has been read, so that --help and mistakes are answered at once.
    from recipes.training.hub import Destination, push

    destination = Destination(repo=args.repo, revision=args.revision, private=args.private, overwrite=args.overwrite)
    more = {"message": args.message, "states": args.push_states, "license": args.license, "twin": args.twin}
    more["evaluation"] = None if args.evaluation is None else Path(args.evaluation)
    print(push(Path(args.run), destination, **more))


if __name__ == "__main__":
    sys.exit(main())
