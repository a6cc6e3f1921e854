"""A model with hooks: what its classifier received and what it gave, one forward pass at a time."""

import contextlib
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nc_probe.hooks.captures import Capture, ClassifierInputCapture, OutputCapture
from nc_probe.hooks.heads import Head, is_compiled, unwrap

__all__ = ["HookedModel", "warn_of_other_logits"]

# Largest difference, relative to the largest logit, between weight @ feature + bias and what the model gave.
LINEAR_ERROR = {torch.float64: 1e-2, torch.float32: 1e-2, torch.bfloat16: 0.1, torch.float16: 0.1}


class HookedModel:
    """Hooks on a model, while it is attached.

    Args:
        model: wrapped or not.
        head: its classifier, if it has one.
        captures: of what is captured besides.
        num_classes: K.
    """

    def __init__(self, model: nn.Module, head: Head | None, captures: Sequence[Capture], num_classes: int) -> None:
        self.model, self.head = model, head
        self._input = None if head is None else ClassifierInputCapture(head)
        inner = [*captures] if self._input is None else [self._input, *captures]
        self._output = OutputCapture(model, inner, num_classes=num_classes)
        self._registered: contextlib.ExitStack | None = None
        self._modules: list[tuple[str, nn.Module]] = []
        self.restart()

    @property
    def attached(self) -> bool:
        """Whether the hooks are there."""
        return self._registered is not None

    def attach(self) -> None:
        """Add the hooks.

        Raises:
            ValueError: they are there, or the classifier is no longer that of the model.
        """
        if self._registered is not None:
            raise ValueError("the probe is already attached: enter it once")
        self.clear()
        if self.head is not None:
            self.head.check(self.model)
        self._modules = [*unwrap(self.model).named_modules()]  # in each update it would take a third of a millisecond
        with contextlib.ExitStack() as stack:
            if is_compiled(self.model):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for handle in self._output.register():
                stack.callback(handle.remove)
            self._registered = stack.pop_all()

    def detach(self) -> None:
        """Remove the hooks, and drop what was captured."""
        assert self._registered is not None
        self._registered.close()
        self._registered = None
        self.clear()

    def clear(self) -> None:
        """Drop any forward pass not yet used."""
        self._output.clear()

    def restart(self) -> None:
        """Begin a pass: its weights may be others."""
        self.clear()
        self._versions: list[int] | None = None
        self._output.copies = True

    def trust_logits(self) -> None:
        """Copy logits no longer in this pass: from now on they are only used where they are found to be right."""
        self._output.copies = self.head is None

    def pop(self, *, tokens: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Return features (B, d), or with `tokens` (B, T, d), and what may be logits of the last forward pass.

        Raises:
            ValueError: not exactly one forward pass since the last time, a model in training mode, or features of
                another shape.
        """
        for name, module in self._modules:
            if module.training:
                raise ValueError(f"model must be in evaluation mode, but its module {name!r} trains: call model.eval()")
        self._check_weights([_version(p) for _, module in self._modules for p in module._parameters.values()])
        output = self._output.pop()
        features = (output[0] if len(output) == 1 else None) if self._input is None else self._input.pop(tokens=tokens)
        if features is None or features.ndim != 2 + tokens:
            shapes, expected = [tuple(x.shape) for x in output], "(B, T, d)" if tokens else "(B, d)"
            raise ValueError(
                f"a model without classifier must give one tensor {expected}, got tensors of shapes {shapes}"
            )
        return features, output

    def _check_weights(self, versions: list[int]) -> None:
        """Warn, once a pass, where the weights are not those of the first update: features are then of two models."""
        if self._versions is None:
            self._versions = versions
        elif self._versions not in ([], versions):
            self._versions = []  # told
            warnings.warn(
                "the model's weights were changed between two updates of one pass: its features are of different "
                "models. Call reset() where a pass begins",
                stacklevel=6,
            )


def _version(parameter: Tensor | None) -> int:
    """How often it was changed."""
    try:
        return 0 if parameter is None else parameter._version
    except RuntimeError:  # of inference mode: it has none
        return 0


def warn_of_other_logits(head: Head, error: float | None, output: Sequence[Tensor]) -> None:
    """Warn where the model does not give weight @ feature + bias.

    Args:
        head: the classifier.
        error: largest difference, relative to the largest logit; None if nothing could be compared.
        output: what the model gave.
    """
    if error is None:
        shapes = [tuple(x.shape) for x in output]
        what = f"could not be compared with what the model gives, tensors of shapes {shapes}"
    elif error > max(LINEAR_ERROR[x.dtype] for x in output):
        what = f"is not what the model gives, from which it differs by {error:.2g} of the largest logit"
    else:
        return
    warnings.warn(
        f"weight @ feature + bias of {head.name!r} {what}: accuracy and NC4 are those of the linear map. If another "
        "layer is the classifier, name it with head='...'",
        stacklevel=5,
    )
