"""What a GPU has no room for, in host memory: tables of which slices are used, and tensors fetched one ahead of their use.

The copies run on a stream of their own, from and to pinned memory, while the GPU computes with what came before. On a machine
without a GPU the same code copies at once, which is how it is tested.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from course_lib.training.frozen import FrozenLinears
from course_lib.training.fused_sizes import ALIGNMENT_ON_HOST, slices_of


class TwoPlaces:
    """Bytes kept in host memory by number, and brought to one of two places on the device: even numbers to one, odd to the other.

    Numbers are used one after another, up or down. When one is asked for, what used its place before has been launched, and the
    next is on its way.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self.host: dict[int, torch.Tensor] = {}  # by number, what `fetch` brings
        self.places = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.holds: list[int | None] = [None, None]
        self.on_gpu = device.type == "cuda"
        self.copies: Any = torch.cuda.Stream(device) if self.on_gpu else None
        self.arrived = [torch.cuda.Event() for _ in range(2)] if self.on_gpu else []

    def store(self, number: int, source: torch.Tensor) -> None:
        """Copy bytes, uint8 of one dimension, to the host."""
        kept = self.host.get(number)
        if kept is None or len(kept) < len(source):
            kept = self.host[number] = torch.empty(len(source), dtype=torch.uint8, pin_memory=self.on_gpu)
        with self._after_what_was_launched():
            kept[: len(source)].copy_(source, non_blocking=True)
        if self.on_gpu:
            source.record_stream(self.copies)
        self.holds = [None if held == number else held for held in self.holds]

    def fetch(self, number: int) -> None:
        """Begin to bring bytes to their place, unless they are there or there are none of that number."""
        place = number % 2
        if self.holds[place] == number or number not in self.host:
            return
        self._begin(number, place)
        self.holds[place] = number

    def use(self, number: int, *, then: int) -> torch.Tensor:
        """The place where the bytes are, once they have arrived; begins to fetch those used next."""
        self.fetch(number)
        self._wait(number % 2)
        self.fetch(then)
        return self.places[number % 2]

    def keep(self, number: int, source: torch.Tensor) -> None:
        """Take bytes, all of a place's size, that will only ever be fetched."""
        self.host[number] = source.cpu().pin_memory() if self.on_gpu else source

    def _begin(self, number: int, place: int) -> None:
        size = min(len(self.host[number]), len(self.places[place]))
        with self._after_what_was_launched():
            self.places[place][:size].copy_(self.host[number][:size], non_blocking=True)
            if self.on_gpu:
                self.arrived[place].record(self.copies)

    def _wait(self, place: int) -> None:
        if self.on_gpu:
            torch.cuda.current_stream().wait_event(self.arrived[place])

    def _after_what_was_launched(self) -> Any:
        if not self.on_gpu:
            return nullcontext()
        self.copies.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.copies)


class FetchedLayers:
    """Frozen weights of decoder layers kept elsewhere; for each layer they stand in one of two places while it is computed."""

    def __init__(
        self,
        layers: list[list[FrozenLinears]],
        modules: list[nn.Module],
        device: torch.device,
        places: type[TwoPlaces] = TwoPlaces,
    ) -> None:
        """`places` says where they are kept: by default in host memory."""
        sizes = [_size([tensor for group in groups for tensor in group.tensors]) for groups in layers]
        self.places = places(device, max(sizes))
        for number, groups in enumerate(layers):
            bytes_of_layer = torch.zeros(len(self.places.places[0]), dtype=torch.uint8)
            start = 0
            for group in groups:
                views, _ = _views(bytes_of_layer, group.tensors, start)
                for view, tensor in zip(views, group.tensors, strict=True):
                    view.copy_(tensor)
                group.tensors, start = _views(self.places.places[number % 2], group.tensors, start)
                group.give_layers(group.tensors)
                group.lasting = False
            self.places.keep(number, bytes_of_layer)
        for number, module in enumerate(modules):  # for evaluation, by the model's own forward
            module.register_forward_pre_hook(lambda *_, number=number: self.use(number, then=number + 1))

    def use(self, number: int, *, then: int) -> None:
        """Have a layer's weights in their place; `then` is the layer after it."""
        self.places.use(number, then=then)


class StoredInputs:
    """Inputs of checkpointed layers, in host memory from forward to backward."""

    def __init__(self, device: torch.device) -> None:
        self.places = TwoPlaces(device, 0)
        self.device, self.size = device, 0
        self.shape, self.dtype = torch.Size(), torch.float32

    def store(self, number: int, x: torch.Tensor) -> None:
        """Copy a layer's input, contiguous and of the same shape for all layers of a pass, to the host."""
        flat = x.view(-1).view(torch.uint8)
        self.shape, self.dtype, self.size = x.shape, x.dtype, len(flat)
        if len(self.places.places[0]) < self.size:
            self.places = TwoPlaces(self.device, self.size)
        self.places.store(number, flat)

    def use(self, number: int) -> torch.Tensor:
        """The input again. The next asked for is that of the layer before."""
        place = self.places.use(number, then=number - 1)
        return place[: self.size].view(self.dtype).view(self.shape)


class HostEmbedding(nn.Module):
    """An embedding table in host memory: its rows are looked up there."""

    def __init__(self, weight: torch.Tensor, device: torch.device) -> None:
        super().__init__()
        self.table, self.device = weight.cpu(), device

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Shape (rows, tokens) to (rows, tokens, width), on the device."""
        return F.embedding(input_ids.cpu(), self.table).to(self.device)


class HostHead(nn.Module):
    """An output head in pinned host memory: slices of the vocabulary go to the device one after another."""

    bias = None

    def __init__(self, weight: torch.Tensor, device: torch.device) -> None:
        super().__init__()
        self.weight = weight.cpu().pin_memory() if device.type == "cuda" else weight
        self.device = device

    def slices(self, rows: int) -> Any:
        """(first token, weight on the device) of each slice; `rows` says for how many rows of logits there must be room."""
        parts = slices_of(*self.weight.shape, rows=rows)
        size = max(part.stop - part.start for part in parts) * self.weight.shape[1] * self.weight.element_size()
        places = TwoPlaces(self.device, size)
        places.host = {number: self.weight[part].view(-1).view(torch.uint8) for number, part in enumerate(parts)}
        for number, part in enumerate(parts):
            place = places.use(number, then=number + 1)
            count = (part.stop - part.start) * self.weight.shape[1] * self.weight.element_size()
            yield part.start, place[:count].view(self.weight.dtype).view(-1, self.weight.shape[1])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Shape (…, width) to (…, vocabulary)."""
        return torch.cat([hidden @ weight.t() for _, weight in self.slices(hidden[..., 0].numel())], dim=-1)


def _size(tensors: list[torch.Tensor]) -> int:
    return sum(
        -(-tensor.numel() * tensor.element_size() // ALIGNMENT_ON_HOST) * ALIGNMENT_ON_HOST for tensor in tensors
    )


def _views(place: torch.Tensor, like: list[torch.Tensor], start: int) -> tuple[list[torch.Tensor], int]:
    """Parts of `place`, uint8, shaped and typed as `like`, from `start` on; and where they end."""
    views = []
    for tensor in like:
        size = tensor.numel() * tensor.element_size()
        views.append(place[start : start + size].view(tensor.dtype).view(tensor.shape))
        start += _size([tensor])
    return views, start
