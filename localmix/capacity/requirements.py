"""What a model takes in memory, with weights of any type: asked of llama.cpp, or computed.

llama.cpp itself says what a context takes (`localmix.capacity.simulation`). Where it cannot be asked, formulas over the
model's metadata answer: exact for one KV cache, within a fifth for the compute buffer of dense models and mixtures,
and too much where a model caches less, with a sliding window for example. So where there are both, llama.cpp's
numbers count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from localmix.capacity.memory import Need, trained_context
from localmix.capacity.placement import Split, Weights
from localmix.capacity.simulation import Buffers, Setting
from localmix.errors import InputError, Interrupted, LocalmixError
from localmix.native.devices import PROCESSOR, Placement
from localmix.sizes import MIB
from localmix.sources.base import Source
from localmix.tensor_types import TensorType, bits

# Both processes of a chat: 60 MiB of their own, and the shared libraries' files.
_PROGRAM_BYTES = 110 * MIB
_GRAPH_BYTES = 4 * MIB  # llama.cpp's own bookkeeping for a context: nodes, the processor's work buffer
_CELL_BYTES = 120  # and for each position of its cache
_TOKEN_BYTES = 170  # one token in llama.cpp's vocabulary: text, score and two map entries
_MERGE_BYTES = 120
_KV_CELLS = 256  # llama.cpp rounds the context up to a multiple
_PROBES = 32
_LONGEST_SIMULATED = 2**20  # llama.cpp notes each cell of a cache, even of one that it only pretends to make


class Requirements:
    """What one model takes, with weights of any type.

    Args:
        source: for its metadata and the shapes of its tensors; weights are not read.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._simulated: dict[tuple[Setting, Placement], Buffers] = {}

    @property
    def simulated(self) -> bool:
        """Whether llama.cpp itself was asked, and answered."""
        return bool(self._simulated)

    def simulate(self, settings: Iterable[Setting], placement: Placement = PROCESSOR) -> None:
        """Ask llama.cpp about settings, all in one child process; what it does not answer stays with the formulas."""
        from localmix import worker
        from localmix.capacity.simulation import simulate, skeleton

        wanted = [
            setting
            for setting in dict.fromkeys(settings)
            if (setting, placement) not in self._simulated and setting.context <= _LONGEST_SIMULATED
        ]
        if not wanted:
            return
        # a file system without holes, a model that cannot do without its vocabulary, a type that its heads refuse:
        # loading will say so, if it is a reason not to load
        try:
            with skeleton(self._source) as path:
                found = worker.run(simulate, path, wanted, placement)
        except Interrupted:
            raise
        except (OSError, LocalmixError):
            return
        self._simulated.update(((setting, placement), buffers) for setting, buffers in zip(wanted, found, strict=True))

    def refuses(self, setting: Setting) -> bool:
        """Whether llama.cpp, which answers about this model, does not about this setting."""
        self.simulate([setting])
        asked = self.simulated and setting.context <= _LONGEST_SIMULATED
        return asked and (setting, PROCESSOR) not in self._simulated

    def buffers(self, setting: Setting, placement: Placement = PROCESSOR) -> Buffers:
        """What a setting takes: as simulated, else by formula."""
        return self._simulated.get((setting, placement)) or _buffers(self._source, setting)

    def need(self, weights: Weights, setting: Setting, repacked: int = 0) -> Need:
        """What the model takes when nothing of it is on a GPU.

        Args:
            weights: with the types that they will have.
            repacked: `repacked_bytes(weights)`, where it matters.
        """
        return self._need(setting, weights.total, repacked, self.buffers(setting))

    def need_beside(self, weights: Weights, setting: Setting, split: Split, shared: bool) -> Need:
        """What a model takes of the processor's memory beside what a split puts on GPUs.

        Args:
            shared: the GPUs compute in the processor's memory.
        """
        buffers = self.buffers(setting, split.placement)
        if shared or not split.devices:
            return self._need(setting, weights.total, 0, buffers)
        compute = {name: size for name, size in buffers.compute.items() if name not in split.devices}
        beside = replace(buffers, compute=compute)
        # beside a GPU the processor takes its weights in the order of the file
        need = self._need(setting, weights.total - split.weights, 0, beside)
        return replace(need, kv=need.kv - split.kv)

    def _need(self, setting: Setting, weights: int, repacked: int, buffers: Buffers) -> Need:
        bookkeeping = _GRAPH_BYTES + _CELL_BYTES * setting.context
        return Need(
            weights=weights,
            repacked=repacked,
            kv=buffers.kv,
            compute=sum(buffers.compute.values()) + bookkeeping,
            output=buffers.output,
            vocabulary=vocabulary_bytes(self._source),
            program=_PROGRAM_BYTES,
        )

    def largest_context(self, setting: Setting, fits: Callable[[Setting], bool]) -> int:
        """The longest context for which `fits` holds, in steps of 256 positions and no longer than the trained one.

        Returns:
            0 if none does.
        """
        low, high = 0, trained_context(self._source) // _KV_CELLS
        while low < high:
            # many at once: a child process takes longer to start than to simulate them
            parts = min(_PROBES, high - low)
            steps = [low + (high - low) * part // parts for part in range(1, parts + 1)]
            settings = [replace(setting, context=step * _KV_CELLS) for step in steps]
            if self.simulated:
                self.simulate(settings)
            too_long = next((step for step, tried in zip(steps, settings, strict=True) if not fits(tried)), high + 1)
            low, high = max((step for step in steps if step < too_long), default=low), too_long - 1
        return low * _KV_CELLS


def repacked_bytes(weights: Weights) -> int:
    """Bytes of the weights that this processor wants in another order than the file's.

    Raises:
        InputError: llama.cpp cannot be loaded.
    """
    from localmix.gguf_format import tensor_bytes
    from localmix.native.repacking import is_repacked

    tied = not any(tensor.name == "output.weight" for tensor in weights.tensors)
    total = 0
    for tensor in weights.tensors:
        if len(tensor.shape) < 2 or (tensor.name.startswith("token_embd") and not tied):
            continue  # looked up or added, not multiplied
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 0
        if is_repacked(tensor.type, tensor.shape[-2], experts):
            total += tensor_bytes(tensor)
    return total


def vocabulary_bytes(source: Source) -> int:
    """What llama.cpp's vocabulary takes."""
    merges = source.get("tokenizer.ggml.merges", [])
    return _TOKEN_BYTES * _vocabulary(source) + _MERGE_BYTES * (len(merges) if isinstance(merges, list) else 0)


def _buffers(source: Source, setting: Setting) -> Buffers:
    """The formulas."""
    cells = -(-setting.context // _KV_CELLS) * _KV_CELLS
    layers = max(1, source.number("{arch}.block_count"))
    kv = int(cells * _kv_values(source) * bits(TensorType[setting.kv_type.upper()]) / 8)
    return Buffers(
        {layer: kv // layers + (kv % layers if layer == 0 else 0) for layer in range(layers)},
        {"CPU": _compute_bytes(source, cells, min(setting.batch, cells), setting.outputs)},
        4 * setting.sequences * _vocabulary(source),
    )


def _kv_values(source: Source) -> int:
    """Numbers that one position adds to the KV cache, over all layers."""
    heads = source.numbers("{arch}.attention.head_count", (1,))
    head_size = source.number("{arch}.embedding_length") // (heads[0] or 1)
    kv_heads = source.numbers("{arch}.attention.head_count_kv", heads)
    # one number for all layers, or one for each
    all_heads = sum(kv_heads) if len(kv_heads) > 1 else source.number("{arch}.block_count") * kv_heads[0]
    key = source.number("{arch}.attention.key_length", head_size)
    value = source.number("{arch}.attention.value_length", head_size)
    return all_heads * (key + value)


def _compute_bytes(source: Source, cells: int, batch: int, outputs: int) -> int:
    """The wider of the two wide places: the logits, or one layer's feed-forward with the attention mask."""
    hidden = source.number("{arch}.embedding_length")
    dense = max(source.numbers("{arch}.feed_forward_length"))
    experts = source.number("{arch}.expert_used_count")
    wide = source.number("{arch}.expert_feed_forward_length", dense) * experts if experts else dense
    logits = 4 * min(batch, outputs) * (_vocabulary(source) + 2 * hidden)
    layer = 4 * batch * (3 * wide + 4 * hidden) + 2 * batch * cells
    return max(logits, layer)


def _vocabulary(source: Source) -> int:
    tokens = source.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list):
        raise InputError(f"{source.path}: the metadata entry tokenizer.ggml.tokens is {tokens!r}, not a list.")
    return source.number("{arch}.vocab_size", len(tokens))
