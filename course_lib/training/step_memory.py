"""What a step of the fused layers holds on the GPU, and when most: the code of fused.py and fused_layer.py gone through with sizes alone.

Every tensor that those modules make is entered in a ledger where they make it, and struck out where the last name for it goes.
`tests/training/test_step_memory.py` runs the real layers and compares byte by byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from course_lib.model_shape import ModelShape
from course_lib.training.fused_sizes import LOGITS_A_CHUNK, aligned, slices_of
from course_lib.training.ledger import Ledger

INTEGER, FLOAT32 = 8, 4  # bytes
FLASH_ROWS = 128  # by which flash attention rounds each sample up in backward


@dataclass(frozen=True)
class Group:
    """Linear layers that read the same input, laid out as `fused_linear.FusedLinears` does.

    Attributes:
        ranks: of each adapter; none where a layer has none.
        joined: the pass in which the adapters are part of the product with the frozen weights.
        dropout: whether the adapters drop part of their input.
    """

    inputs: int
    outputs: int
    ranks: tuple[int, ...]
    joined: Literal["forward", "backward"] | None
    dropout: bool = False

    @property
    def rank(self) -> int:
        """Of all adapters together."""
        return sum(self.ranks)

    @property
    def input_width(self) -> int:
        """Of what `new_input` gives: with room for A x."""
        return self.inputs + (aligned(self.rank) if self.joined == "forward" else 0)

    @property
    def grad_width(self) -> int:
        """Of what `new_output_grad` gives: with room for t."""
        return self.outputs + (aligned(self.rank) if self.joined == "backward" else 0)

    @property
    def whole(self) -> int:
        """Elements of W with the rows and columns for the adapters."""
        return (self.outputs + (self.rank if self.joined == "backward" else 0)) * self.input_width


@dataclass(frozen=True)
class Step:
    """What the sizes of one micro-batch follow from: `tokens` in one flat row, `trained` of them under the loss."""

    shape: ModelShape
    groups: tuple[Group, Group, Group, Group]  # q k v, o, gate up, down
    tokens: int
    trained: int
    samples: int
    element: int  # bytes of the type it computes in
    checkpointed: int  # layers, from the first on, that run again in backward
    offload: frozenset[str] = frozenset()
    loss_chunk: int | None = None
    flash: bool = True  # attention that takes all samples in one call; not in float32 (attention.takes_edges)


def replay_step(step: Step, ledger: Ledger) -> None:
    """One micro-batch, forward and backward."""
    _Replay(step, ledger).run()


@lru_cache(maxsize=1024)
def step_memory(step: Step) -> Ledger:
    """The ledger of a step on a GPU, closed: nothing may be entered any more. Kept, for a plan asks for the same step many times."""
    ledger = Ledger()
    replay_step(step, ledger)
    return ledger


class _Replay:
    def __init__(self, step: Step, ledger: Ledger) -> None:
        self.step, self.ledger, self.shape = step, ledger, step.shape
        self.qkv, self.o, self.gate_up, self.down = step.groups
        self.queries, self.keys = step.shape.heads * step.shape.head_dim, step.shape.kv_heads * step.shape.head_dim
        self.last = step.shape.layers - 1

    def rows(self, width: int) -> int:
        """Bytes of a tensor (tokens, width)."""
        return self.step.tokens * width * self.step.element

    def trained(self, width: int) -> int:
        """Bytes of a tensor (trained, width)."""
        return self.step.trained * width * self.step.element

    def run(self) -> None:
        ledger, tokens = self.ledger, self.step.tokens
        ledger.moment = "forward pass"
        ledger.hold("ids and positions", 2 * tokens * INTEGER)
        ledger.hold("embedded", self.rows(self.shape.width))  # also x of the first layer
        ledger.hold("cos", self.rows(self.shape.head_dim))
        ledger.hold("sin", self.rows(self.shape.head_dim))
        for number in range(self.shape.layers):
            self.layer_forward(number, again=False)
            ledger.free(f"delta {number - 1}")
            if number and self.forgets(number - 1):
                ledger.free(f"middle {number - 1}")  # was the x of this layer
            if self.forgets(number):
                stays = [f"middle {number}", f"delta {number}"]
                ledger.free_layer(number, but=stays if "checkpoints" in self.step.offload else [*stays, f"x {number}"])
        self.head()
        if self.shape.layers > 1 and self.forgets(0) and "checkpoints" in self.step.offload:
            ledger.free("embedded")
        self.backward()
        ledger.free(*list(ledger.alive))

    def forgets(self, number: int) -> bool:
        """Whether a layer runs again in backward."""
        return number < self.step.checkpointed

    def layer_forward(self, number: int, *, again: bool) -> None:
        ledger, rows, tokens, width = self.ledger, self.rows, self.step.tokens, self.shape.width
        ledger.hold("normed", rows(self.qkv.input_width))
        if number and not again:
            ledger.hold(f"x {number}", rows(width))
        ledger.hold(f"rstd {number}", tokens * FLOAT32)
        self.project(self.qkv, f"A x of qkv {number}")
        ledger.hold(f"projected {number}", rows(self.qkv.outputs))
        if self.shape.head_norms:
            with ledger.during(flat_q=rows(self.queries)):
                ledger.hold(f"q {number}", rows(self.queries))
                ledger.hold(f"rstd of q {number}", tokens * self.shape.heads * FLOAT32)
                ledger.hold("flat k", rows(self.keys))
            ledger.hold(f"k {number}", rows(self.keys))
            ledger.hold(f"rstd of k {number}", tokens * self.shape.kv_heads * FLOAT32)
            ledger.free("flat k")
        if self.queries != self.keys:  # each key and value head once for every query head
            ledger.hold(f"repeated k {number}", rows(self.queries))
            ledger.hold(f"repeated v {number}", rows(self.queries))
        if not self.step.flash:
            # a call for each sample: their outputs, which become one; and with groups of heads, all the weights
            ledger.hold(f"attended samples {number}", rows(self.queries))
            weights = self.shape.heads * tokens * tokens // self.step.samples * FLOAT32
            ledger.hold(f"attention weights {number}", weights if self.queries != self.keys else 0)
        ledger.hold(f"attended {number}", rows(self.queries))
        ledger.hold(f"log of sums {number}", tokens * self.shape.heads * FLOAT32)
        self.project(self.o, f"A x of o {number}")
        ledger.hold("out", rows(width))
        ledger.hold("normed again", rows(self.gate_up.input_width))
        ledger.hold(f"middle {number}", rows(width))
        ledger.hold(f"middle rstd {number}", tokens * FLOAT32)
        ledger.free("normed")
        self.project(self.gate_up, f"A x of gate up {number}")
        ledger.hold(f"gate up {number}", rows(self.gate_up.outputs))
        if not again:
            ledger.hold("hidden", rows(self.down.inputs))
            self.project(self.down, f"A x of down {number}")
            ledger.hold(f"delta {number}", rows(width))
        ledger.free("hidden", "out", "normed again")

    def project(self, group: Group, name: str) -> None:
        """A x, through dropout where there is any."""
        self.ledger.hold(name, self.rows(group.rank))
        self.drop(group, self.rows(group.inputs))

    def drop(self, group: Group, size: int) -> None:
        """The mask and the product; and the product of the adapter before, until its name is given to the new one."""
        if group.dropout and group.ranks:
            before = size if len(group.ranks) > 1 else 0
            self.ledger.touch(dropped_before=before, mask=size, dropped=size)

    def head(self) -> None:
        ledger, step, trained = self.ledger, self.step, self.trained
        width, vocabulary = self.shape.width, self.shape.vocabulary
        ledger.moment = "head and loss"
        ledger.hold("positions and targets", 2 * step.trained * INTEGER)
        with ledger.during(x_there=trained(width), delta_there=trained(width)):
            ledger.hold("rows", trained(width))
            ledger.hold("normed rows", trained(width))
            ledger.hold("rstd of rows", step.trained * FLOAT32)
        ledger.free(f"delta {self.last}")
        if "head" in step.offload:
            self.streamed_loss()
        else:
            rows = min(step.trained, step.loss_chunk or max(1, LOGITS_A_CHUNK // vocabulary))
            after = min(rows, step.trained - rows)  # the first chunk has its name until the next is made
            a_row = vocabulary * step.element
            ledger.hold("by normed", trained(width))
            ledger.hold("sum", FLOAT32)
            ledger.touch(logits=rows * a_row, logits_after=after * a_row)
            ledger.touch(logits=rows * a_row, losses=rows * FLOAT32, their_sum=FLOAT32)
        ledger.free("normed rows")

    def streamed_loss(self) -> None:
        ledger, step, trained = self.ledger, self.step, self.trained
        width = self.shape.width
        size = slices_of(self.shape.vocabulary, width, rows=step.trained)[0].stop
        several = size < self.shape.vocabulary
        logits, narrow = step.trained * size * FLOAT32, step.trained * size * step.element
        if step.element == FLOAT32:
            narrow = 0  # the logits themselves
        with ledger.during(
            places=2 * size * width * step.element, sums=8 * step.trained * FLOAT32,
            expected=step.trained * width * FLOAT32, row_of_target=trained(width), logits=logits,
        ):  # fmt: skip
            ledger.touch(product=narrow, logits_before=logits * several)
            ledger.touch(narrow=narrow, weighted=trained(width))
            ledger.touch(rows_of_slice=trained(width))
            ledger.hold("by normed", trained(width))

    def backward(self) -> None:
        ledger, rows, trained, width = self.ledger, self.rows, self.trained, self.shape.width
        ledger.moment = "backward pass"
        ledger.hold("by rows", trained(width))
        ledger.hold("norm of rows", trained(width))
        with ledger.during(like=rows(width)):
            ledger.hold("by output", rows(self.down.grad_width))
        ledger.free("rows", "rstd of rows", "by normed", "by rows", "positions and targets", "sum")
        for number in reversed(range(self.shape.layers)):
            if self.forgets(number):
                self.layer_forward(number, again=True)
                ledger.free("norm of rows")  # its name is used again
            if number:
                ledger.hold("by input", rows(self.down.grad_width))
            self.layer_backward(number)
            ledger.free("by output")
            if number:  # what is kept of the layer above has its name until then
                ledger.alive["by output"] = ledger.alive.pop("by input")
            ledger.free_layer(number)

    def layer_backward(self, number: int) -> None:
        ledger, rows, width = self.ledger, self.rows, self.shape.width
        ledger.hold("t", rows(self.down.rank))
        ledger.hold("hidden", rows(self.down.inputs))
        self.by_dropped(self.down)
        if f"A x of down {number}" not in ledger.alive:
            ledger.hold(f"A x of down {number}", rows(self.down.rank))
        self.drop(self.down, rows(self.down.inputs))
        ledger.free("hidden")
        ledger.hold("t of gate up", rows(self.gate_up.rank))
        ledger.hold("by normed", rows(width))
        self.by_dropped(self.gate_up)
        ledger.free("t")
        ledger.hold("by middle", rows(self.o.grad_width))
        ledger.hold("normed", rows(width))
        self.drop(self.gate_up, rows(width))
        ledger.free("normed", "by normed", f"gate up {number}", f"middle {number}")
        with ledger.during(t_of_o=rows(self.o.rank)):
            ledger.hold("by attended", rows(self.queries))
            self.by_dropped(self.o)
            self.drop(self.o, rows(self.queries))
        self.attention_backward(number)
        ledger.hold("by projected", rows(self.qkv.outputs))
        if self.shape.head_norms:
            self.head_norms_backward()
        ledger.free("t of gate up")
        ledger.hold("t of qkv", rows(self.qkv.rank))
        if number:
            ledger.hold("by normed", rows(width))
            self.by_dropped(self.qkv)
        ledger.hold("normed", rows(width))
        self.drop(self.qkv, rows(width))
        ledger.free("t of qkv", "by normed", "normed", "by projected", "by q k v", "by attended", "by middle")

    def by_dropped(self, group: Group) -> None:
        """The input's gradient through each adapter's dropout."""
        if group.dropout and group.ranks:
            size = self.rows(group.inputs)
            self.ledger.touch(through_a=size, mask=size, dropped=size)

    def attention_backward(self, number: int) -> None:
        ledger, rows, step = self.ledger, self.rows, self.step
        padded = step.tokens + FLASH_ROWS * step.samples
        repeated = 2 * rows(self.queries) if self.queries != self.keys else 0
        with ledger.during(
            sums=padded * self.queries * FLOAT32, of_rows=padded * self.shape.heads * FLOAT32, by_repeated=repeated
        ):
            ledger.hold("by q k v", rows(self.queries) + (0 if repeated else 2 * rows(self.keys)))
        if repeated:
            ledger.free("by q k v")
            ledger.hold("by q k v", rows(self.queries + 2 * self.keys))
        ledger.free(f"repeated k {number}", f"repeated v {number}", f"log of sums {number}")

    def head_norms_backward(self) -> None:
        """By q, then by k: copies of what the norm read and of the gradient, and the norm's own results."""
        queries, keys = self.rows(self.queries), self.rows(self.keys)
        self.ledger.touch(of_q=4 * queries, k_before=keys)
        self.ledger.touch(still_of_q=2 * queries, of_k=4 * keys)
