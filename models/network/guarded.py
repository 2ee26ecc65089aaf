"""The module that is served: a victim with its PSIM adapters, one set of weights for all.

An adapter is a LoRA beside the victim's weights (Zhao et al., NAACL Findings 2024, section 4.1):
switched on, the module is PSIM; switched off, it is the victim, bit for bit. There are several:
checkpoints of one training, each of which judges every text (docs/method.md). The layers below the
lowest adapter, which are the same for all of them, run once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from models.errors import VictimError
from models.network.last_layer import Rotation, Tail, tail_of

Inputs = Mapping[str, torch.Tensor]

# Names of query and value projections across families, and of those that fuse them with the key.
QUERIES = {"query", "query_proj", "q_lin", "q_proj"}
VALUES = {"value", "value_proj", "v_lin", "v_proj"}
FUSED = {"in_proj", "query_key_value", "qkv_proj", "Wqkv"}


WATCHED_DEPTHS = (1 / 2, 2 / 3, 5 / 6)
"""Where hidden states tell texts apart best: neither in the words nor in the classes yet. At the
first one all tokens are watched, by their mean; at the others the token that is read."""


class Trunk:
    """Layers that no adapter changes: run once for all checkpoints, and watched on the way.

    Args:
        stack: all layers of a transformer, in their order.
        length: how many of them, from the lowest, are the trunk.
        reads_last: whether the classifier reads the last token and not the first.
    """

    def __init__(
        self, stack: Sequence[nn.Module] = (), length: int = 0, *, reads_last: bool = False
    ) -> None:
        layers, depth = stack[:length], max(len(stack), 1)
        self.length, self.share = length, length / depth
        self.watched = [min(max(1, round(share * depth)), length) for share in WATCHED_DEPTHS]
        """Numbers, from 1, of the layers whose output is watched, one for each depth."""
        self._reads_last = reads_last
        self._stopping = False
        self._kept: list[Any] | None = None
        self._states: list[torch.Tensor] | None = None
        self._mask = torch.empty(0)
        for number, layer in enumerate(layers, 1):
            # The instance's forward and not a module around it: names of weights stay as they are.
            layer.forward = self._run(layer.forward, number, number == len(layers))
        for above in stack[length : length + 1]:
            above.forward = self._stoppable(above.forward)

    @contextmanager
    def watching(self, inputs: Inputs) -> Iterator[list[torch.Tensor]]:
        """Collect what is watched in a pass, by `WATCHED_DEPTHS`, float32, (rows, H) each."""
        self._states, self._mask = [], inputs["attention_mask"]
        try:
            yield self._states
        finally:
            self._states = None

    def _watch(self, output: Any, *, all_tokens: bool) -> torch.Tensor:
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        # Padding is on the right; prompts, which the mask does not know, are on the left.
        prompts = hidden.shape[1] - self._mask.shape[1]
        if all_tokens:
            mask = self._mask.float()[:, None]
            return (mask @ hidden[:, prompts:].float())[:, 0] / mask.sum(-1)
        if not self._reads_last:
            return hidden[:, 0].float()
        last = _last(self._mask) + prompts
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last].float()

    def read_positions(self, mask: torch.Tensor) -> torch.Tensor:
        """Return where the classifier reads, shape (rows,), in inputs without prompts."""
        return _last(mask) if self._reads_last else torch.zeros_like(mask[:, 0])

    def output(self, run: Callable[[], object]) -> tuple[torch.Tensor, Rotation | None]:
        """Return the trunk's output in a pass that ends there, shape (rows, T, H).

        With it the rotation of queries and keys, of families that have one.
        """
        self._stopping = True
        try:
            run()
        except _ReachedError as reached:
            return reached.hidden, reached.rotation
        finally:
            self._stopping = False
        raise RuntimeError("the pass did not come to the layer above the trunk")

    def _stoppable(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._stopping:
                raise _ReachedError(hidden_states, kwargs.get("position_embeddings"))
            return forward(hidden_states, *args, **kwargs)

        return run

    @contextmanager
    def shared(self, kept: list[Any] | None) -> Iterator[None]:
        """Within it every forward pass is on the same inputs: the first one's output is kept.

        Args:
            kept: empty, or what an earlier `shared` kept of the same inputs; None keeps nothing.
        """
        self._kept = kept
        try:
            yield
        finally:
            self._kept = None

    def _run(self, forward: Callable[..., Any], number: int, is_top: bool) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._kept:
                return self._kept[0]
            output = forward(*args, **kwargs)
            if self._states is not None:
                self._states += [
                    self._watch(output, all_tokens=depth == 0)
                    for depth, watched in enumerate(self.watched)
                    if watched == number
                ]
            if self._kept is not None and is_top:
                self._kept.append(output)
            return output

        return run


class _ReachedError(Exception):
    """Ends a pass where the trunk ends; what it carries is not an error."""

    def __init__(self, hidden: torch.Tensor, rotation: Rotation | None) -> None:
        super().__init__()
        self.hidden, self.rotation = hidden, rotation


class Activations:
    """Class-conditional Mahalanobis distance of hidden states (Lee et al., NeurIPS 2018, eq. 2).

    Stays in float32 whatever the victim's dtype is.

    Args:
        whitening: by watched depth, shape (3, D, D); h @ whitening has unit covariance.
        means: whitened means of clean texts by predicted class, shape (3, C, D).
    """

    FEATURES = 2

    def __init__(self, whitening: torch.Tensor, means: torch.Tensor) -> None:
        self.whitening, self.means = whitening, means

    def distances(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the distances to each class that the two features go by, shape (rows, 2, C).

        The first is the geometric mean of those at the lower two depths, where a text is far from
        the others by what all of its tokens are like: either one alone is not enough. The second
        is that of the highest, where a backdoor has all but decided (docs/method.md).

        Args:
            states: what `Trunk.watching` collects, 3 of shape (rows, D).
        """
        device = states[0].device
        self.whitening, self.means = self.whitening.to(device), self.means.to(device)
        whitened = torch.stack(list(states)) @ self.whitening
        # Not as |h|² - 2hm + |m|², which cancels where a text is near the mean.
        tokens, read, top = torch.cdist(
            whitened, self.means, compute_mode="donot_use_mm_for_euclid_dist"
        )
        return torch.stack([(tokens * read).sqrt(), top], 1)


def readings_of(
    logits: torch.Tensor, states: Sequence[torch.Tensor], activations: Activations | None
) -> torch.Tensor:
    """Return what `Guarded.screen` does of what `Guarded.run` returns, in float32."""
    readings = logits.float().softmax(-1)
    if activations is None:
        return readings
    return torch.cat([readings, activations.distances(states)], 1)


class Guarded(nn.Module):
    """Victim and PSIM in one module.

    Args:
        victim: an `AutoModelForSequenceClassification`, or a PEFT model that wraps one (a victim
            tuned by prompt- or prefix-tuning, which cannot be merged).
        psim: the PEFT model that injected the PSIM LoRA into the victim's transformer, in place.
            Its adapters are PSIM's checkpoints.
        trunk: what all of them have in common.
        tail: the last layer, where the adapters are in that layer only and its family is known;
            else every checkpoint runs it as a whole.
    """

    def __init__(
        self,
        victim: nn.Module,
        psim: PeftModel,
        trunk: Trunk | None = None,
        tail: Tail | None = None,
    ) -> None:
        super().__init__()
        self.victim = victim
        self.psim = psim
        self.trunk = trunk or Trunk()
        self.tail = tail
        self.activations: Activations | None = None
        """The second screen, once it is fitted."""

    @property
    def config(self) -> Any:
        """The victim's transformers configuration."""
        return self.psim.get_base_model().config

    @property
    def checkpoints(self) -> list[str]:
        """Names of the adapters."""
        return list(self.psim.peft_config)

    @property
    def passes(self) -> float:
        """What it costs to screen and classify a text, in forward passes of the victim.

        Distances, and a tail, which is less than the layer that it stands for, are next to nothing.
        """
        if self.tail is not None:
            return 1.0
        return 2 + (len(self.checkpoints) - 1) * (1 - self.trunk.share)

    def psim_logits(self, inputs: Inputs) -> torch.Tensor:
        """Return logits with the active adapter on, shape (rows, C)."""
        logits: torch.Tensor = self.victim(**inputs).logits
        return logits

    def screen(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return readings in float32, shape (rows, V, C), and what `classify_rows` needs.

        The first K readings are PSIM's probabilities, by checkpoint; the others are the distances
        of hidden states to the classes, `Activations.FEATURES` or, while that is not fitted, none.
        The second value is None without a tail.
        """
        logits, rows, states = self.run(inputs)
        return readings_of(logits, states, self.activations), rows

    def run(
        self, inputs: Inputs
    ) -> tuple[torch.Tensor, torch.Tensor | None, Sequence[torch.Tensor]]:
        """Do what `screen` does in the victim's dtype, which other runtimes can do in its place.

        Returns logits by checkpoint, shape (rows, K, C), what `classify_rows` needs, and the
        watched states.
        """
        with self.trunk.watching(inputs) as states:
            logits, rows = self._by_tail(inputs) if self.tail else self._by_whole_passes(inputs)
        return logits, rows, states

    def _by_tail(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits by checkpoint, (rows, K, C), and the victim's last states, (rows, H)."""
        assert self.tail is not None  # noqa: S101 - the only caller has asked
        hidden, rotation = self.trunk.output(lambda: self.victim(**inputs))
        mask = inputs["attention_mask"]
        read = self.trunk.read_positions(mask)
        rows = self.tail(hidden, mask, read, self.checkpoints, rotation)
        logits = self.tail.head(rows[:, :-1].flatten(0, 1))
        # Copied, since a view would keep those of all branches alive until it is classified.
        return logits.view(rows.shape[0], len(self.checkpoints), -1), rows[:, -1].clone()

    def _by_whole_passes(self, inputs: Inputs) -> tuple[torch.Tensor, None]:
        logits = []
        with self.trunk.shared([]):
            for checkpoint in self.checkpoints:
                self.psim.set_adapter(checkpoint, inference_mode=True)
                logits.append(self.psim_logits(inputs))
        return torch.stack(logits, 1), None

    def classify_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the victim's probabilities in float32, shape (n, C), from what `screen` kept."""
        if self.tail is None:
            raise ValueError("there is no tail; classify the inputs")
        return self.tail.head(rows).float().softmax(-1)

    def states(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return watched hidden states, shape (rows, 3, D), and the victim's logits, (rows, C)."""
        with self.trunk.watching(inputs) as states, self.psim.disable_adapter():
            logits: torch.Tensor = self.victim(**inputs).logits
        return torch.stack(states, 1), logits

    def classify(self, inputs: Inputs) -> torch.Tensor:
        """Return the victim's probabilities in float32, shape (rows, C)."""
        with self.psim.disable_adapter():
            logits: torch.Tensor = self.victim(**inputs).logits
        return logits.float().softmax(-1)


def guard(victim: nn.Module, config: LoraConfig, checkpoints: int = 1) -> Guarded:
    """Inject fresh PSIM adapters into `victim`, in place; only they can be trained.

    A victim that is a prompt-learning PEFT model keeps its prompts: the adapters go into the
    transformer under them.
    """
    victim.requires_grad_(False)
    read_last_token(transformer_of(victim))
    # PEFT injects in place, so calling the victim runs the injected layers too.
    model = transformer_of(victim)
    psim = with_adapters(model, config, checkpoints)
    stack, trunk = _trunk(model, config)
    on_top = trunk.length == len(stack) - 1 and not config.modules_to_save
    # Prompts come as embeddings, or as keys and values that a tail knows nothing of.
    tail = tail_of(model) if on_top and not isinstance(victim, PeftModel) else None
    guarded = Guarded(victim, psim, trunk, tail)
    if tail is not None:
        guarded.config.use_cache = False  # a decoder would fill it in vain
    return guarded


def _trunk(model: nn.Module, config: LoraConfig) -> tuple[list[nn.Module], Trunk]:
    """Return the layers of a transformer, and those below the lowest that is adapted as a trunk."""
    lowest = min(sorted(config.target_modules or ()), key=_depth)
    parts = lowest.split(".")
    stack = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    layers = model.get_submodule(".".join(parts[:stack]))
    stacked = list(layers.children())
    # transformers calls the head of models that read the last token `score`.
    return stacked, Trunk(stacked, _depth(lowest), reads_last=hasattr(model, "score"))


def read_last_token(model: nn.Module) -> None:
    """Have a decoder classify by a text's last token, behind prompts too.

    Given embeddings instead of token ids, as PEFT gives them behind prompts, transformers takes the
    last position of the batch, which is padding in all but its longest text.
    """
    if not hasattr(model, "score"):
        return
    seen: dict[str, torch.Tensor] = {}

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.clear()
        if kwargs.get("inputs_embeds") is not None and kwargs.get("attention_mask") is not None:
            seen["mask"] = kwargs["attention_mask"]

    def pick(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        (hidden,) = args
        if "mask" not in seen or hidden.shape[1] == 1:
            return None
        last = _last(seen["mask"])
        return (hidden[torch.arange(hidden.shape[0], device=hidden.device), last][:, None],)

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.get_submodule("score").register_forward_pre_hook(pick)


def _last(mask: torch.Tensor) -> torch.Tensor:
    """Return the position of each row's last token; prompts and text have no gap."""
    return mask.long().cumsum(1).argmax(1)


def with_adapters(model: nn.Module, config: PeftConfig, checkpoints: int) -> PeftModel:
    """Give a transformer so many fresh adapters."""
    first, *others = (f"checkpoint{number}" for number in range(checkpoints))
    psim = get_peft_model(model, config, adapter_name=first)
    for name in others:
        psim.add_adapter(name, config)
    return psim


def transformer_of(victim: nn.Module) -> nn.Module:
    """Return the transformers model inside a victim."""
    return victim.base_model if isinstance(victim, PeftModel) else victim


def lora_config(
    victim: nn.Module, layers: int, rank: int = 8, *, queries: bool = True
) -> LoraConfig:
    """Configure LoRA on query and value projections of the victim's last `layers` layers.

    Not on the classifier head: trained along, it falls on poisoned texts too. Scaling alpha is
    2 * rank (Zhao et al., section 5.1). Without `queries`, on the values only.

    Raises:
        VictimError: the victim has no such projections, or fewer layers, or two stacks of them.
    """
    if getattr(getattr(transformer_of(victim), "config", None), "is_encoder_decoder", False):
        raise VictimError(
            "the victim has an encoder and a decoder; PSIM guards models of one stack"
        )
    wanted = VALUES | FUSED | (QUERIES if queries else set())
    names = [
        name
        for name, module in transformer_of(victim).named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in wanted
    ]
    depths = sorted({_depth(name) for name in names})
    if not names:
        raise VictimError(
            f"{type(victim).__name__} has no query and value projections that PSIM can adapt; "
            "supported are BERT, RoBERTa, DistilBERT, DeBERTa and LLaMA-type models"
        )
    if not 1 <= layers <= len(depths):
        raise VictimError(f"cannot adapt the last {layers} layers: the victim has {len(depths)}")
    chosen = [name for name in names if _depth(name) in depths[-layers:]]
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=chosen)


def _depth(name: str) -> int:
    """Return the layer number in a module path such as `bert.encoder.layer.5.attention.query`."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)
