"""Words of a command line, made ready for jsonargparse, and made from settings."""

import dataclasses
import json
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from recipes.errors import UserError, check, did_you_mean

PRESETS = Path(__file__).parents[1] / "presets"

# Types in words.
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "dict": "keys with values",
    "NoneType": "null",
}

# What other scripts call a setting of this one.
ALIASES = {"learning_rate": "lr", "wd": "weight_decay", "bs": "batch_size", "data_dir": "dataset", "arch": "model"}

# The later of two flags wins, which scripts rely on, but whoever asks for two profiles wants neither of them alone.
ONCE = ("--imbalance",)


def arranged(words: Sequence[str], config: type) -> list[str]:
    """Rearrange the words for jsonargparse: those of --config before the rest, because later ones win, those of a list,
    as in `--correction_at 2 5`, in one, and `true` after a switch that stands alone, as in `--private`.

    Args:
        words: of the command line.
        config: dataclass of the settings, whose types tell what is a list.

    Raises:
        UserError: two imbalance profiles, a file of settings that is not there, or one that has a key twice.
    """
    kinds = {f"--{f.name}": (f.type, *typing.get_args(f.type)) for f in dataclasses.fields(config)}
    flags: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            flags.append(word.split("=", 1))
        elif flags:
            flags[-1].append(word)
        else:
            flags.append([word])
    given: dict[str, list[str]] = {}
    for i, (flag, *values) in enumerate(flags):
        before = given.setdefault(flag, values)
        if flag in ONCE and before != values:
            raise UserError(f"{flag} is given twice, as {' '.join(before)!r} and {' '.join(values)!r}; allowed: once")
        if flag == "--config" and values:
            path = config_file(values[0])
            _check_keys(path)
            flags[i] = [flag, str(path), *values[1:]]
        if not values and bool in kinds.get(flag, ()):
            flags[i] = [flag, "true"]
        is_list = [typing.get_origin(kind) is list for kind in kinds.get(flag, ())]
        if any(is_list) and len(values) > (0 if is_list[0] else 1) and not values[0].startswith("["):
            flags[i] = [flag, f"[{','.join(values)}]"]
    flags.sort(key=lambda words: words[0] != "--config")
    return [word for words in flags for word in words]


def config_file(word: str) -> Path:
    """Find the file that `--config` names: a YAML file, or one of the presets that come with the recipes.

    Raises:
        UserError: there is neither.
    """
    if Path(word).is_file():
        return Path(word)
    presets = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    check(word in presets, "config", word, f"a YAML file, or one of {', '.join(presets)}{did_you_mean(word, presets)}")
    return PRESETS / f"{word}.yaml"


def _check_keys(path: Path) -> None:
    """Refuse a file without keys, or with one of them twice, of which YAML would take the last."""
    try:
        root = yaml.compose(path.read_text(), yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return
    if root is not None and not isinstance(root, yaml.MappingNode):
        kind = "list" if isinstance(root, yaml.SequenceNode) else "text"
        raise UserError(f"config {str(path)!r} holds a {kind}; allowed: a line NAME: VALUE for each setting")
    keys = [key.value for key, _ in root.value] if root is not None else []
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"{key} is given twice in {str(path)!r}; allowed: once")


def words_of(config: Any) -> list[str]:
    """The shortest command line that gives these settings: flags for what is not at its default.

    Args:
        config: dataclass of the settings.
    """
    words: list[str] = []
    for field in dataclasses.fields(config):
        value, factory = getattr(config, field.name), field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if value != default:
            words += _flag(field.name, value)
    return words


def _flag(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flag(f"{name}.{key}", item)
        return
    yield f"--{name}"
    yield value if isinstance(value, str) else json.dumps(value)


def refusal(message: str, names: Sequence[str]) -> str:
    """Rephrase what jsonargparse says of a command line like every other error.

    Args:
        message: of its ArgumentError.
        names: of all settings.
    """
    message = re.sub(r'(?:Parser key|Key) "([\w.]+)"', r"\1", " ".join(message.split()))
    message = re.sub(r"<class '(\w+)'>", r"\1", message).replace("typing.", "")
    if unknown := re.match(r"unrecognized arguments: --([\w.-]+)|Option '([\w.-]+)'", message):
        word = unknown[1] or unknown[2]
        alias = ALIASES.get(word.replace("-", "_"))
        hint = f" (did you mean {alias!r}?)" if alias else did_you_mean(word, names)
        return f"{message}{hint}; allowed: the flags that --help lists"
    if typed := re.match(r"([\w.]+): (.*) (?:Got|Given) value: (.*)$", message):
        name, expected, value = typed.groups()
        words = [word for words in re.findall(r"Expected a Literal\[(.*?)\]", expected) for word in words.split(", ")]
        kinds = re.findall(r"Expected (?:an? )?(int|float|bool|dict|NoneType)\b", expected)
        kinds += ["list"] if "list" in expected else []
        allowed = ", ".join(dict.fromkeys([*words, *(WORDS[kind] for kind in kinds)]))
        if allowed:
            hint = did_you_mean(value, [word[1:-1] for word in words])
            return f"{name} is {_value(value)!r}; allowed: {allowed}{hint}"
    return message


def _value(text: str) -> Any:
    """Read a value as YAML has it; as text where it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
