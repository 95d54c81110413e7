"""Adapters over a checkpoint: PEFT's formulas, slice by slice, and every way in which the two do not fit."""

from __future__ import annotations

import json
import math
import re
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from localmix.errors import FileError, InputError, LocalmixError, UsageError
from localmix.merge import merge
from localmix.sources.adapter import Lora, open_adapter, parse_lora
from localmix.sources.checkpoint import open_checkpoint, open_shards
from localmix.sources.lora import lay_over
from localmix.sources.low_rank import LoadedFactors, to_floats
from localmix.sources.safetensors import StoredTensor, open_shard
from localmix.tensor_types import FLOAT_TYPES, TensorType, widen
from tests.adapters import (
    CONFIG,
    DENSE,
    KINDS,
    MIXTURE,
    PREFIX,
    WEIGHTS,
    Kind,
    edit_config,
    read_checkpoint,
    write_adapter,
    write_pair,
)
from tests.checkpoints import TOKENIZER_PIECES, Tensors, make_tensors, read_shard, write_checkpoint, write_shard
from tests.sources.test_fp8 import CONFIGS, quantized

Doubles = dict[str, npt.NDArray[np.float64]]

QUERY = f"{PREFIX}model.layers.0.self_attn.q_proj"


@contextmanager
def overlaid(base: Path, *loras: Lora) -> Iterator[Mapping[str, StoredTensor]]:
    """A checkpoint's tensors with adapters over them."""
    with ExitStack() as opened:
        shards = open_shards(base, {path.name for path in base.iterdir()}, opened)
        stored = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
        adapters = [open_adapter(lora) for lora in loras]
        for adapter in adapters:
            opened.callback(adapter.close)
        yield lay_over(base, stored, adapters)


def read_all(tensors: Mapping[str, StoredTensor]) -> dict[str, npt.NDArray[Any]]:
    return {name: tensor.read_rows(0, tensor.shape[0]).reshape(tensor.shape) for name, tensor in tensors.items()}


def wide(tensors: Tensors) -> Doubles:
    return {name: to_floats(values, dtype).astype(np.float64) for name, (dtype, values) in tensors.items()}


def expected(kind: Kind, base: Doubles, adapter: Doubles, config: Mapping[str, Any]) -> Doubles:
    """PEFT's formulas in double precision, on whole matrices."""
    found = dict(base)
    adapter = {name.removeprefix(PREFIX): values for name, values in adapter.items()}
    for name, values in adapter.items():
        own = name.replace(".base_layer", "")
        if own in base:
            found[own] = values
    for name, a in adapter.items():
        embedding = name.endswith(".lora_embedding_A")
        if not embedding and not name.endswith(".lora_A.weight"):
            continue
        module = re.sub(r"\.lora_(A\.weight|embedding_A)$", "", name)
        b = adapter[f"{module}.lora_embedding_B" if embedding else f"{module}.lora_B.weight"]
        alpha = next(
            (value for pattern, value in config.get("alpha_pattern", {}).items() if re.search(f"{pattern}$", module)),
            config["lora_alpha"],
        )
        rank = a.shape[0] // (kind.shape.experts if ".experts" in module else 1)
        rank = a.shape[0] if not kind.stacked else rank
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if kind.stacked and module.endswith((".experts", ".experts.base_layer")):
            block = re.sub(r"\.mlp\.experts.*", ".block_sparse_moe.experts", module)
            gates = module.endswith(".base_layer")
            for expert in range(kind.shape.experts):
                change = scale * b[:, expert :: kind.shape.experts] @ a[expert * rank : (expert + 1) * rank]
                parts = zip(("w1", "w3"), np.split(change, 2), strict=True) if gates else (("w2", change),)
                for leaf, part in parts:
                    found[f"{block}.{expert}.{leaf}.weight"] = found[f"{block}.{expert}.{leaf}.weight"] + part
            continue
        target = f"{module}.weight".replace(".mlp.gate.", ".block_sparse_moe.gate.")
        change = scale * (b @ a)
        weight = found[target] + (change.T if embedding else change)
        magnitude = adapter.get(f"{module}.lora_magnitude_vector")
        if magnitude is not None:
            axis = 0 if embedding else 1
            norms = np.sqrt((weight**2).sum(axis=axis))
            weight = weight * np.expand_dims(magnitude / norms, axis)
        found[target] = weight
        if kind.biases:
            found[f"{module}.bias"] = found[f"{module}.bias"] + scale * adapter[f"{module}.lora_B.bias"]
    if kind.tokens:
        found["model.embed_tokens.weight"] = found["model.embed_tokens.weight"].copy()
        rows = adapter["model.embed_tokens.token_adapter.trainable_tokens_delta"]
        found["model.embed_tokens.weight"][list(kind.tokens)] = rows
    return found


def check_formula(kind: Kind, base: Path, adapter: Path) -> None:
    wanted = expected(
        kind,
        wide(read_checkpoint(base)),
        wide(read_shard(adapter / WEIGHTS)),
        json.loads((adapter / CONFIG).read_text()),
    )
    with overlaid(base, Lora(adapter)) as tensors:
        found = read_all(tensors)
    assert found.keys() == wanted.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", KINDS)
def test_the_formula(tmp_path: Path, name: str) -> None:
    base, adapter = write_pair(tmp_path, name, "F32")
    check_formula(KINDS[name], base, adapter)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_any_slice_has_the_bits_of_the_whole(tmp_path: Path, name: str, dtype: str) -> None:
    base, adapter = write_pair(tmp_path, name, dtype)
    random = np.random.default_rng(5)
    with overlaid(base, Lora(adapter)) as tensors, overlaid(base, Lora(adapter)) as again:
        whole = read_all(tensors)
        for tensor_name, tensor in again.items():
            rows = tensor.shape[0]
            start = int(random.integers(0, rows))
            stop = int(random.integers(start, rows + 1))
            np.testing.assert_array_equal(
                tensor.read_rows(start, stop).reshape(-1), whole[tensor_name][start:stop].reshape(-1)
            )


@pytest.mark.parametrize("rank", [1, 5, 64, 256])
def test_tiles_are_the_product_and_do_not_depend_on_the_rows(rank: int) -> None:
    random = np.random.default_rng(rank)
    left = random.standard_normal((203, rank), np.float32)
    right = random.standard_normal((rank, 1213), np.float32)
    loaded = LoadedFactors(left, right)
    whole = loaded.product(0, 203)
    np.testing.assert_allclose(whole, left.astype(np.float64) @ right, rtol=1e-4, atol=1e-4)
    for start, stop in ((0, 1), (16, 32), (17, 18), (31, 203), (202, 203), (9, 9)):
        np.testing.assert_array_equal(loaded.product(start, stop), whole[start:stop])


def write_transposed(folder: Path, out: int, columns: int) -> tuple[Path, Path]:
    """A checkpoint of a model that stores `[in, out]`, as GPT-2 does, and an adapter of it."""
    base = write_checkpoint(folder / "base", DENSE)
    random = np.random.default_rng(0)

    def values(*shape: int) -> tuple[str, npt.NDArray[np.float32]]:
        return "F32", random.standard_normal(shape, np.float32)

    for shard in base.glob("model*"):
        shard.unlink()
    write_shard(base / "model.safetensors", {"h.0.attn.c_attn.weight": values(columns, out)})
    adapter = write_adapter(folder / "adapter", write_checkpoint(folder / "other", DENSE), Kind(DENSE, "q_proj"))
    module = f"{PREFIX}h.0.attn.c_attn"
    write_shard(
        adapter / WEIGHTS,
        {f"{module}.lora_A.weight": values(4, columns), f"{module}.lora_B.weight": values(out, 4)},
    )
    edit_config(adapter, fan_in_fan_out=True)
    return base, adapter


@pytest.mark.parametrize(("out", "columns"), [(48, 32), (32, 32)])
def test_weights_that_are_stored_transposed(tmp_path: Path, out: int, columns: int) -> None:
    base, adapter = write_transposed(tmp_path, out, columns)
    factors = {name[-8]: values for name, (_, values) in read_shard(adapter / WEIGHTS).items()}
    before = read_shard(base / "model.safetensors")["h.0.attn.c_attn.weight"][1]
    with overlaid(base, Lora(adapter)) as tensors:
        found = read_all(tensors)["h.0.attn.c_attn.weight"]
    np.testing.assert_allclose(found, before + 2 * (factors["B"] @ factors["A"]).T, rtol=1e-5, atol=1e-5)


def test_convolutions(tmp_path: Path) -> None:
    base, adapter = write_transposed(tmp_path, 8, 8)
    random = np.random.default_rng(2)
    weight, a, b, magnitude = (
        random.standard_normal(shape, np.float32) for shape in ((10, 6, 3), (4, 6, 3), (10, 4, 1), (1, 10, 1))
    )
    write_shard(base / "model.safetensors", {"conv.weight": ("F32", weight)})
    names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    parts = zip(names, (a, b, magnitude), strict=True)
    write_shard(adapter / WEIGHTS, {f"{PREFIX}conv.{name}": ("F32", values) for name, values in parts})
    edit_config(adapter, fan_in_fan_out=False, use_dora=True)
    changed = weight + 2 * np.einsum("orx,rik->oik", b, a)
    wanted = changed * (magnitude.reshape(-1) / np.sqrt((changed**2).sum(axis=(1, 2))))[:, None, None]
    with overlaid(base, Lora(adapter)) as tensors:
        np.testing.assert_allclose(read_all(tensors)["conv.weight"], wanted, rtol=1e-5, atol=1e-5)
        # as a converter asks for them
        rows = replace(tensors["conv.weight"], shape=(60, 3)).read_rows(7, 23)
        np.testing.assert_array_equal(rows, read_all(tensors)["conv.weight"].reshape(60, 3)[7:23])


@pytest.mark.parametrize("name", ["plain", "magnitudes", "biases"])
def test_a_scale_weighs_the_whole_change(tmp_path: Path, name: str) -> None:
    base, adapter = write_pair(tmp_path, name, "F32")
    with overlaid(base) as before, overlaid(base, Lora(adapter)) as full, overlaid(base, Lora(adapter, -0.5)) as some:
        one, other, third = read_all(before), read_all(full), read_all(some)
    for tensor in one:
        wanted = one[tensor] - 0.5 * (other[tensor] - one[tensor])
        np.testing.assert_allclose(third[tensor], wanted, rtol=1e-5, atol=1e-6)


def test_changes_of_several_adapters_add_up_in_any_order(tmp_path: Path) -> None:
    base, first = write_pair(tmp_path, "magnitudes", "F32")
    second = write_adapter(tmp_path / "second", base, KINDS["rank-stabilized"])
    with overlaid(base) as tensors:
        before = read_all(tensors)
    alone = []
    for lora in (Lora(first), Lora(second, 0.25)):
        with overlaid(base, lora) as tensors:
            alone.append(read_all(tensors))
    for loras in ((Lora(first), Lora(second, 0.25)), (Lora(second, 0.25), Lora(first))):
        with overlaid(base, *loras) as tensors:
            both = read_all(tensors)
        for name, values in both.items():
            wanted = alone[0][name] + alone[1][name] - before[name]
            np.testing.assert_allclose(values, wanted, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", KINDS)
def test_a_converted_overlay_is_the_converted_merge(tmp_path: Path, name: str) -> None:
    base, adapter = write_pair(tmp_path, name)
    merge(base, [Lora(adapter)], tmp_path / "merged", threads=1)
    with open_checkpoint(base, loras=[Lora(adapter)]) as one, open_checkpoint(tmp_path / "merged") as other:
        assert one.metadata.pop("general.name").value == f"base + {name}"
        assert other.metadata.pop("general.name").value == "merged"
        assert one.metadata == other.metadata
        assert one.tensors == other.tensors
        for info in one.tensors:
            np.testing.assert_array_equal(
                one.read(info, 0, info.rows), other.read(info, 0, info.rows), err_msg=info.name
            )


def test_a_larger_vocabulary_brings_its_tokenizer(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, "vocabulary")
    with open_checkpoint(base, loras=[Lora(adapter)]) as source:
        tokens = source.get("tokenizer.ggml.tokens")
        assert len(tokens) == source.get("{arch}.vocab_size") == TOKENIZER_PIECES + 24
        assert tokens[TOKENIZER_PIECES] == "<extra_0>"
        assert source.files()[-1] == adapter / WEIGHTS
        assert any("is merged into" in note for note in source.notes)
        assert not any("vocab_size" in note for note in source.notes)


def test_an_adapter_without_embeddings_leaves_the_tokenizer_alone(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, "plain")
    (adapter / "tokenizer.model").write_bytes(b"of another model")
    with open_checkpoint(base, loras=[Lora(adapter)]) as source:
        assert len(source.get("tokenizer.ggml.tokens")) == TOKENIZER_PIECES


def test_an_output_of_its_own_for_a_tied_model(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", replace(DENSE, tied=True))
    adapter = write_adapter(tmp_path / "adapter", base, Kind(DENSE, "q_proj"))
    tensors = read_shard(adapter / WEIGHTS)
    values = np.random.default_rng(0).standard_normal((TOKENIZER_PIECES, 32), np.float32)
    write_shard(adapter / WEIGHTS, tensors | {f"{PREFIX}lm_head.weight": ("F32", values)})
    with open_checkpoint(base, loras=[Lora(adapter)]) as source:
        output = next(info for info in source.tensors if info.name == "output.weight")
        assert output.type == TensorType.BF16  # as the embedding
        np.testing.assert_allclose(widen(source.read(output, 0, output.rows), output.type), values, rtol=2**-8)


def change(name: str, make: Callable[[npt.NDArray[Any]], npt.NDArray[Any] | None]) -> Callable[[Path], None]:
    """Damage to one tensor of an adapter; None takes it away."""

    def damage(adapter: Path) -> None:
        tensors = read_shard(adapter / WEIGHTS)
        dtype, values = tensors.pop(name)
        made = make(values.copy())
        if made is not None:
            tensors[name] = dtype, made
        write_shard(adapter / WEIGHTS, tensors)

    return damage


def add(name: str, *shape: int) -> Callable[[Path], None]:
    def damage(adapter: Path) -> None:
        tensors = read_shard(adapter / WEIGHTS)
        write_shard(adapter / WEIGHTS, tensors | {name: ("F32", np.ones(shape, np.float32))})

    return damage


def configure(**changes: Any) -> Callable[[Path], None]:
    return lambda adapter: edit_config(adapter, **changes)


def pickle_only(adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")


DAMAGES: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "another base": (change(f"{QUERY}.lora_A.weight", lambda a: a[:, :-1]), r"no adapter of .*q_proj.lora_A.weight"),
    "more rows": (change(f"{QUERY}.lora_B.weight", lambda b: b[1:]), r"for a weight of \[31, 32\].* shape \[32, 32\]"),
    "factors of two ranks": (change(f"{QUERY}.lora_B.weight", lambda b: b[:, 1:]), "no adapter of"),
    "half a pair": (change(f"{QUERY}.lora_B.weight", lambda b: None), "not the other tensors of that module"),
    "no matrix": (change(f"{QUERY}.lora_A.weight", lambda a: a.reshape(-1)), "are no matrices"),
    "an empty matrix": (change(f"{QUERY}.lora_A.weight", lambda a: a[:0]), "are no matrices"),
    "a layer too many": (add(f"{PREFIX}model.layers.9.self_attn.q_proj.weight", 32, 32), "belong nowhere"),
    "no such module": (
        lambda adapter: (
            add(f"{PREFIX}model.layers.9.x.lora_A.weight", 4, 32)(adapter),
            add(f"{PREFIX}model.layers.9.x.lora_B.weight", 32, 4)(adapter),
        )[0],
        "layers.9.x.lora_A.weight' belongs to no weight",
    ),
    "an unknown kind of tensor": (add(f"{QUERY}.lora_mask", 4), "belong nowhere .*lora_mask"),
    "two for one place": (
        lambda adapter: (add(f"{PREFIX}x.base_layer.bias", 3)(adapter), add(f"{PREFIX}x.bias", 3)(adapter))[0],
        "are for the same place",
    ),
    "whole, of another shape": (add(f"{PREFIX}model.norm.weight", 33), r"'model.norm.weight' has the shape \[32\]"),
    "a bias nobody has": (add(f"{QUERY}.lora_B.bias", 32), "there is no 'model.layers.0.self_attn.q_proj.bias'"),
    "a magnitude too many": (add(f"{QUERY}.lora_magnitude_vector", 32), "use_dora: False"),
    "a magnitude missing": (configure(use_dora=True), "use_dora: True"),
    "another rank than said": (configure(r=8), "has the rank 4, but adapter_config.json says 8"),
    "a rank of the wrong kind": (configure(r="four"), "r is 'four'"),
    "an alpha of the wrong kind": (configure(lora_alpha=True), "lora_alpha is True"),
    "a broken pattern": (configure(rank_pattern={"(": 3}), "no regular expression"),
    "patterns that are none": (configure(alpha_pattern=[1]), "alpha_pattern is"),
    "another method": (configure(peft_type="LOHA"), "an adapter of type 'LOHA'"),
    "no method": (configure(peft_type=...), "an adapter of type None"),
    "changed base weights": (configure(init_lora_weights="pissa_niter_4"), "had changed before"),
    "repeated layers": (configure(layer_replication=[[0, 2]]), "layer_replication"),
    "invocation tokens": (configure(alora_invocation_tokens=[1]), "takes effect only after certain tokens"),
    "tokens without a vocabulary": (
        add(f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 32),
        "does not say whose 2 rows",
    ),
    "only the embedding is larger": (add(f"{PREFIX}model.embed_tokens.weight", 400, 32), "400 embeddings but 384"),
    "NaN": (change(f"{QUERY}.lora_B.weight", lambda b: b * np.float32("nan")), "q_proj.weight' at row 0, column 0 nan"),
    "integers": (
        lambda adapter: write_shard(adapter / WEIGHTS, {"x": ("I32", np.zeros(3, "<i4"))}),  # type: ignore[func-returns-value]
        "is I32; adapters are",
    ),
    "nothing": (lambda adapter: write_shard(adapter / WEIGHTS, {}), "holds no tensor"),
    "pickled": (pickle_only, "can run whatever code"),
    "no weights": (lambda adapter: (adapter / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "cut off": (
        lambda adapter: (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-4]) and None,
        "cut off|lies at",
    ),
    "no configuration": (lambda adapter: (adapter / CONFIG).unlink(), "no PEFT adapter"),
    "a broken configuration": (lambda adapter: (adapter / CONFIG).write_text("{") and None, "not valid JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_named(tmp_path: Path, damage: str) -> None:
    base, adapter = write_pair(tmp_path, "rank-stabilized", "F32")
    inflict, sentence = DAMAGES[damage]
    inflict(adapter)
    with pytest.raises(InputError, match=sentence) as error, overlaid(base, Lora(adapter)) as tensors:
        read_all(tensors)
    assert len(error.value.message) < 500


def test_the_base_that_it_was_trained_on_is_said(tmp_path: Path) -> None:
    _, adapter = write_pair(tmp_path, "plain")
    other = write_checkpoint(tmp_path / "other", DENSE)
    with pytest.raises(InputError) as error, overlaid(other, Lora(adapter)):
        pass
    assert "block_sparse_moe" in error.value.message
    assert error.value.hint == "It was trained on 'example/base'."


def test_a_half_that_does_not_hold_the_sum_is_said(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, "rank-stabilized", "F16")
    change(f"{QUERY}.lora_B.weight", lambda b: b * np.float32(1e8))(adapter)
    with (
        pytest.raises(InputError, match="which F16 cannot hold"),
        overlaid(base, Lora(adapter)) as tensors,
    ):
        read_all(tensors)


@pytest.mark.parametrize("name", ["vocabulary", "tokens", "trained-biases"])
def test_whole_tensors_cannot_be_weighed_or_shared(tmp_path: Path, name: str) -> None:
    base, adapter = write_pair(tmp_path, name)
    with pytest.raises(UsageError, match="cannot be weighed"), overlaid(base, Lora(adapter, 0.5)):
        pass
    if name != "trained-biases":
        second = write_adapter(tmp_path / "second", base, KINDS["vocabulary" if name == "vocabulary" else "embedding"])
        for loras in ((Lora(adapter), Lora(second)), (Lora(second), Lora(adapter))):
            with pytest.raises(InputError, match="both change"), overlaid(base, *loras):
                pass


def test_folders_that_are_none(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, "plain")
    for path, kind in ((tmp_path / "absent", FileError), (adapter / WEIGHTS, InputError), (base, InputError)):
        with pytest.raises(LocalmixError) as error:
            open_adapter(Lora(path))
        assert type(error.value) is kind
        assert error.value.hint
    (base / "model.safetensors.index.json").unlink()
    for shard in base.glob("model*"):
        shard.unlink()
    with pytest.raises(InputError, match="has no weights to merge"):
        open_checkpoint(base, loras=[Lora(adapter)])


def test_scales_are_read_strictly(tmp_path: Path) -> None:
    odd = tmp_path / "rank=64"
    odd.mkdir()
    assert parse_lora("a/b") == Lora(Path("a/b"))
    assert parse_lora("a/b=-0.5") == Lora(Path("a/b"), -0.5)
    assert parse_lora(str(odd)) == Lora(odd)
    assert parse_lora(f"{odd}=2") == Lora(odd, 2.0)
    for spec in ("a=", "a=b", "a=nan", "a=inf", "=0.5"):
        with pytest.raises(UsageError, match="no adapter with a scale"):
            parse_lora(spec)


def test_the_recipe_tells_scales_and_settings(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, "plain")
    recipes = set()
    for scale, alpha in ((1, 8), (0.5, 8), (1, 16)):
        edit_config(adapter, lora_alpha=alpha)
        with open_checkpoint(base, loras=[Lora(adapter, scale)]) as source:
            recipes.add(source.recipe)
    with open_checkpoint(base) as source:
        recipes.add(source.recipe)
    assert len(recipes) == 4


def test_memory_is_that_of_factors_and_slices(tmp_path: Path) -> None:
    rows, columns, rank = 8192, 2048, 16
    weight = np.zeros((rows, columns), "<u2")
    write_shard(tmp_path / "base.safetensors", {"x.weight": ("BF16", weight)})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    a, b = np.ones((rank, columns), np.float32), np.ones((rows, rank), np.float32)
    write_shard(adapter / WEIGHTS, {"x.lora_A.weight": ("F32", a), "x.lora_B.weight": ("F32", b)})
    shard, opened = open_shard(tmp_path / "base.safetensors"), open_adapter(Lora(adapter))
    tensor = lay_over(tmp_path, shard.tensors, [opened])["x.weight"]
    tracemalloc.start()
    for start in range(0, rows, 512):
        assert tensor.read_rows(start, start + 512)[0, 0] == 0x4180  # 16 in BF16
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    opened.close()
    shard.close()
    assert peak < 24 << 20  # the whole tensor takes 64 MiB in float32


def test_stacked_experts_of_other_names(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, "stacked-experts", "F32")
    with overlaid(base, Lora(adapter)) as tensors:
        wanted = read_all(tensors)

    def rename(name: str) -> str:
        for own, other in (("block_sparse_moe", "mlp"), ("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            name = name.replace(own, other)
        return name

    (base / "model.safetensors.index.json").unlink()
    for shard in base.glob("model*"):
        write_shard(shard, {rename(name): tensor for name, tensor in read_shard(shard).items()})
    with overlaid(base, Lora(adapter)) as tensors:
        found = read_all(tensors)
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[rename(name)], values)


def test_stacked_experts_of_another_base(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, "stacked-experts", "F32")
    module = f"{PREFIX}model.layers.1.mlp.experts"
    damage = change(f"{module}.lora_A.weight", lambda a: a[:, :-1])
    damage(adapter)
    with pytest.raises(InputError, match=r"is for 2 experts' weights of \[32, 47\]"), overlaid(base, Lora(adapter)):
        pass


def test_mixtures_read_experts_one_by_one(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, "plain")
    with open_checkpoint(base, loras=[Lora(adapter)]) as source, overlaid(base, Lora(adapter)) as tensors:
        info = next(info for info in source.tensors if info.name == "blk.1.ffn_down_exps.weight")
        rows = MIXTURE.hidden
        for expert in range(MIXTURE.experts):
            wanted = tensors[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"]
            got = source.read(info, expert * rows, (expert + 1) * rows)
            assert got.dtype == FLOAT_TYPES[info.type]
            np.testing.assert_array_equal(got, wanted.read_rows(0, rows))


def test_an_adapter_of_an_fp8_checkpoint(tmp_path: Path) -> None:
    scales, ending, block = CONFIGS["static"]
    shape = replace(MIXTURE, shards=1)
    narrow, plain = quantized(make_tensors(shape), scales, ending)
    folders = [
        write_checkpoint(tmp_path / "plain" / "base", shape),
        write_checkpoint(tmp_path / "small" / "base", replace(shape, config={"quantization_config": block})),
    ]
    for folder, tensors in zip(folders, (plain, narrow), strict=True):
        write_shard(folder / "model.safetensors", tensors)
    adapter = write_adapter(tmp_path / "adapter", folders[0], KINDS["plain"])
    with (
        open_checkpoint(folders[0], loras=[Lora(adapter)]) as one,
        open_checkpoint(folders[1], loras=[Lora(adapter)]) as other,
    ):
        for info in one.tensors:
            np.testing.assert_array_equal(one.read(info, 0, info.rows), other.read(info, 0, info.rows))
    with pytest.raises(InputError, match="already quantized"):
        merge(folders[1], [Lora(adapter)], tmp_path / "out", threads=1)
