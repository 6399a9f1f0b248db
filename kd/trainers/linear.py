"""The loss from hidden states, as a module: what a trainer runs wherever model and teacher have linear heads."""

from dataclasses import dataclass

from torch import Tensor, nn

from kd.heads import LinearHead, NoLinearHeadError, SplitModel
from kd.linear_distillation import TokenScores, linear_distillation_loss, linear_scores


@dataclass(frozen=True)
class TeacherStates:
    """What a teacher says of a batch, short of its logits; nothing at all without a teacher."""

    hidden: Tensor | None = None
    """(B, L, width)."""
    weight: Tensor | None = None
    """(V, width) of its head."""
    bias: Tensor | None = None
    """(V,) of its head."""
    softcap: float | None = None
    """Bound of its logits."""

    @staticmethod
    def of(hidden: Tensor, head: LinearHead) -> "TeacherStates":
        """Return hidden states together with the head that they are for."""
        return TeacherStates(hidden, head.weight, head.bias, head.softcap)


NO_TEACHER = TeacherStates()


class LinearLoss(nn.Module):
    """A model and its loss in one forward pass, so that whatever wraps this module sees the head in use.

    Args:
        model: The model that is trained.
        compile_body: Let torch compile all of it but the head.

    Raises:
        NoLinearHeadError: if the model has no linear head, or one whose gradient is not implemented.
    """

    def __init__(self, model: nn.Module, *, compile_body: bool = False) -> None:
        super().__init__()
        self.model = model
        self._split = SplitModel(model)
        if self._split.head.softcap is not None:
            raise NoLinearHeadError("its logits are soft-capped, which is implemented for teachers only")
        if compile_body:
            self._split.compile_body()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        teacher: TeacherStates = NO_TEACHER,
        alpha: float = 0.0,
        temperature: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `linear_distillation_loss` of a batch (B, L)."""
        head = self._split.head
        return linear_distillation_loss(
            self._split.hidden(input_ids),
            head.weight,
            teacher.hidden,
            teacher.weight,
            labels,
            alpha,
            temperature,
            student_bias=head.bias,
            teacher_bias=teacher.bias,
            teacher_softcap=teacher.softcap,
        )

    def scores(self, input_ids: Tensor, labels: Tensor, teacher: TeacherStates = NO_TEACHER) -> TokenScores:
        """Return `linear_scores` of a batch (B, L)."""
        head = self._split.head
        return linear_scores(
            self._split.hidden(input_ids),
            head.weight,
            teacher.hidden,
            teacher.weight,
            labels,
            student_bias=head.bias,
            teacher_bias=teacher.bias,
            teacher_softcap=teacher.softcap,
        )
