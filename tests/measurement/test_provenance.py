"""What is said about how something was measured."""

from __future__ import annotations

from localmix.measurement.corpus import Corpus, CorpusFile
from localmix.measurement.perplexity import Conditions
from localmix.measurement.provenance import Provenance
from localmix.native.library import LLAMA_CPP_COMMIT
from localmix.rope_scaling import RopeScaling

TEXTS = [Corpus((CorpusFile(f"{name}.txt", 5, name * 64),), b"text") for name in "ab"]


def test_a_table() -> None:
    found = Provenance.of(TEXTS[:1], [("a.txt", 1020, 4)] * 2, Conditions(512, threads=1), reference="f16.gguf")
    assert found.caption == (
        "a.txt (sha256 aaaaaaaaaaaa…): 1,020 tokens scored in 4 chunks of 512."
        f" llama.cpp {LLAMA_CPP_COMMIT}, 1 thread. ΔPPL and KLD against f16.gguf."
    )
    assert found.fields == {
        "Corpus": "a.txt",
        "SHA-256": "a" * 64,
        "Scored": "1,020 tokens in 4 chunks",
        "Context": "512",
        "Engine": f"llama.cpp {LLAMA_CPP_COMMIT}",
        "Threads": "1",
        "Reference": "f16.gguf",
    }


def test_a_curve_over_two_texts_with_unusual_settings() -> None:
    conditions = Conditions(threads=3, rope=RopeScaling("yarn", 4.0, ntk_factor=2.0), kv_type="q8_0")
    found = Provenance.of(TEXTS, (), conditions, [512, 1024], devices=["CUDA0", "10.0.0.2:50052", "CUDA0"])
    assert found.caption == (
        "a.txt (sha256 aaaaaaaaaaaa…). b.txt (sha256 bbbbbbbbbbbb…)."
        f" llama.cpp {LLAMA_CPP_COMMIT}, 3 threads, layers on CUDA0 and 10.0.0.2:50052, KV cache q8_0,"
        " RoPE scaling yarn, factor 4, NTK factor 2."
    )
    assert found.fields["Corpus 2"] == "b.txt" and found.fields["Context"] == "512, 1024"
    assert "Scored 1" not in found.fields


def test_counts_that_differ_are_left_out() -> None:
    found = Provenance.of(TEXTS[:1], [("a.txt", 1020, 4), ("a.txt", 900, 4)], Conditions(512, threads=1))
    assert (found.corpora[0].tokens, found.corpora[0].chunks) == (0, 0)
