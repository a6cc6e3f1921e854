"""The training objective: the loss and, for deep equilibrium networks, the terms of `timm_deq`."""

from collections.abc import Sequence
from contextlib import ExitStack

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from recipes.errors import UserError, user_errors
from recipes.imbalance.losses import Loss, create_loss
from recipes.settings.config import TrainConfig
from recipes.settings.contradictions import SCALE
from timm_deq import Equilibrium, FixedPointCorrection, JacobianPenalty


def create_criterion(config: TrainConfig, counts: Sequence[int]) -> Loss:
    """Create the loss of a configuration.

    Args:
        counts: training images of each class, (K,).

    Raises:
        UserError: an argument that the loss does not have, or does not allow.
    """
    arguments = dict(config.loss_args)
    if config.loss == "ldam":  # its margins are those of the classifier's cosines
        arguments["scale"] = config.classifier_scale or SCALE
    if config.reweight_beta is not None:
        arguments["beta"] = config.reweight_beta
    with user_errors(TypeError, what=f"loss {config.loss!r} cannot be created with loss_args {config.loss_args}: "):
        return create_loss(config.loss, counts, **config.only("label_smoothing", "reweight_epoch"), **arguments)


class Objective:
    """Loss of a batch, to be open while the model is trained.

    Args:
        net: the model itself, without the wrapper of `prepare`.
        criterion: mean loss of logits (B, K) and labels (B,) or (B, K).
        jacobian_weight: weight of the penalty of the Jacobian; 0 for none.
        correction_at: steps of the solver whose iterates are corrected too; none if empty.

    Raises:
        UserError: the model has no equilibrium to penalise, or not exactly one to correct, or is
            sharded, where these aids have not been shown to be right.
    """

    def __init__(
        self, net: nn.Module, criterion: Loss, *, jacobian_weight: float = 0.0, correction_at: Sequence[int] = ()
    ):
        layers = sum(isinstance(module, Equilibrium) for module in net.modules())
        if jacobian_weight and not layers:
            raise UserError(f"jacobian_weight is {jacobian_weight}; allowed: 0 for a model without an equilibrium")
        if correction_at and layers != 1:
            raise UserError(
                f"correction_at is {list(correction_at)}; allowed: none for a model with {layers} equilibria, not 1"
            )
        if (jacobian_weight or correction_at) and any(isinstance(module, FSDPModule) for module in net.modules()):
            raise UserError("jacobian_weight and correction_at are not allowed for a sharded model")
        self.criterion, self.jacobian_weight = criterion, jacobian_weight
        self.penalty = JacobianPenalty(net) if jacobian_weight else None
        self.correction = FixedPointCorrection(net, at=correction_at) if correction_at else None
        self._open = ExitStack()

    def __enter__(self) -> "Objective":
        for aid in (self.penalty, self.correction):
            if aid is not None:
                self._open.enter_context(aid)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective to minimise, and the loss (without the penalty) to report.

        Args:
            logits: the model's output in training, (B, K); ((n + 1) B, K) with n iterates to correct.
            labels: (B,), or distributions over the classes (B, K).
        """
        if self.correction is None:
            loss = self.criterion(logits, labels)
        else:
            loss = self.correction.loss(self.criterion, logits, labels)
        penalised = loss if self.penalty is None else loss + self.jacobian_weight * self.penalty.mean()
        return penalised, loss.detach()
