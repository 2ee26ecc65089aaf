"""A drop-in for a transformers `pipeline("text-classification")`: same calls, same answers."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from models.errors import DataError, PsimError
from psim.guard import Guard, GuardResult, StrPath, load
from service.pipeline.policy import reason_for

TASKS = ("text-classification", "sentiment-analysis")
"""Both names that transformers has for the task."""
NAMED = 10
"""Numbers of rejected texts that an error names."""
OnRejected = Literal["raise", "mark"]
TopK = int | Literal[""] | None
"""As in transformers: None is all labels, and the empty string stands for no argument."""


class RejectedError(PsimError):
    """Texts that the policy rejects, so that the call has no answer."""

    def __init__(self, results: Sequence[GuardResult]) -> None:
        self.results = list(results)
        """Of all texts of the call, in order, those that were classified included."""
        self.rejected = [number for number, one in enumerate(results) if one.rejected]
        """Numbers of the rejected texts, from 0."""
        named = ", ".join(map(str, self.rejected[:NAMED]))
        more = ", …" if len(self.rejected) > NAMED else ""
        reason = reason_for(one.verdict for one in results if one.rejected)
        super().__init__(
            f"{len(self.rejected)} of {len(results)} texts were rejected (number {named}{more}): "
            f"{reason}"
        )

    def __reduce__(self) -> tuple[type["RejectedError"], tuple[list[GuardResult]]]:
        """Say how to make it again where a worker process raised it."""
        return RejectedError, (self.results,)


class GuardPipeline:
    """A guard that is called like transformers' `TextClassificationPipeline`; see `pipeline`."""

    task = TASKS[0]

    def __init__(
        self, guard: Guard, *, top_k: TopK = "", on_rejected: OnRejected = "raise"
    ) -> None:
        if on_rejected not in get_args(OnRejected):
            raise PsimError(f"on_rejected is {on_rejected!r}; give raise or mark")
        self.guard = guard
        self._top_k, self._marks = _checked_top_k(top_k), on_rejected == "mark"

    def __call__(
        self,
        inputs: str | list[str],
        *,
        top_k: TopK = "",
        truncation: bool | str = True,
        padding: object = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
    ) -> list[Any]:
        """Return a dictionary with `label` and `score` for each text; with `top_k`, a list of them.

        One string is answered as transformers does: in a list of one dictionary; with `top_k` in
        this call, in the list of its labels; with that of the pipeline, in a list of one list.

        Args:
            inputs: one text, or a list of texts.
            top_k: how many labels to return, best first; None returns all.
            truncation: texts are always cut to what the classifier reads, so False is refused.
            padding, batch_size, num_workers: without effect: texts are batched by their length.

        Raises:
            RejectedError: the policy rejects a text, and the pipeline does not mark it.
            DataError: the inputs are not texts.
            ScreenError, EngineError: a text cannot be judged, or not be classified.
        """
        if not truncation:
            raise PsimError("truncation=False: texts are always cut to what the classifier reads")
        if not isinstance(inputs, str | list):
            raise DataError(f"the input is {type(inputs).__name__}, not a string or a list of them")
        asked = self._top_k if top_k == "" else _checked_top_k(top_k)
        results = self.guard([inputs] if isinstance(inputs, str) else inputs)
        if not self._marks and any(one.rejected for one in results):
            raise RejectedError(results)
        answers = [self._answer(one, asked) for one in results]
        return answers[0] if isinstance(inputs, str) and top_k != "" else answers

    def _answer(self, result: GuardResult, top_k: TopK) -> Any:
        mark = {"finding": str(result.finding)} if self._marks and result.finding else {}
        scores = result.scores or [(None, None)]
        rows = [{"label": label, "score": score, **mark} for label, score in scores]
        return rows[0] if top_k == "" else rows[:top_k]


def pipeline(
    task: str,
    model: StrPath | Guard,
    *,
    top_k: TopK = "",
    on_rejected: OnRejected = "raise",
) -> GuardPipeline:
    """Return a bundle's classifier to be called like a transformers pipeline.

    Args:
        task: `text-classification`, or its other name `sentiment-analysis`.
        model: folder of the bundle, or a guard that `load` returned with other options.
        top_k: how many labels to return of each text; None returns all.
        on_rejected: `raise` raises a `RejectedError` if a text of the call is rejected. `mark`
            answers it with the label and score None, and adds the key `finding` to the answers of
            all texts in which something was found. By default it is raised, since code that was
            written for transformers does not expect a text without a label.

    Raises:
        BundleError: as `load` does.
        PsimError: there is no such task or option.
    """
    if task not in TASKS:
        raise PsimError(f"the task is {task!r}; a bundle can do {TASKS[0]}")
    guard = model if isinstance(model, Guard) else load(model)
    return GuardPipeline(guard, top_k=top_k, on_rejected=on_rejected)


def _checked_top_k(top_k: TopK) -> TopK:
    if top_k in (None, "") or (isinstance(top_k, int) and top_k > 0):
        return top_k
    raise PsimError(f"top_k is {top_k!r}; give 1 or more, or None for all labels")
