"""What a measurement was made of and with: a perplexity says nothing without it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from localmix.measurement.corpus import Corpus
from localmix.measurement.perplexity import ENGINE, Conditions
from localmix.native.devices import default_threads
from localmix.rope_scaling import RopeScaling


@dataclass(frozen=True)
class MeasuredText:
    """A corpus, and how much of it was scored; 0 tokens and chunks where they differ or nothing was."""

    name: str
    bytes: int
    sha256: str
    tokens: int
    chunks: int


@dataclass(frozen=True)
class Provenance:
    """Everything that has to be the same for a measurement to give the same numbers, and the threads.

    Attributes:
        contexts: tokens of a chunk; several for a curve.
        reference: file name of what divergences are taken against; empty for none.
        devices: what was computed on beside the processor, in words.
    """

    corpora: tuple[MeasuredText, ...]
    contexts: tuple[int, ...]
    engine: str
    threads: int
    kv_type: str
    rope: RopeScaling | None
    reference: str
    devices: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        corpora: Sequence[Corpus],
        scored: Iterable[tuple[str, int, int]],
        conditions: Conditions,
        contexts: Sequence[int] = (),
        reference: str = "",
        devices: Iterable[str] = (),
    ) -> Provenance:
        """What was measured.

        Args:
            scored: of each measurement the corpus, its scored tokens and its chunks.
            contexts: where there are several.
            devices: of each model; one counts once.
        """
        found: dict[str, set[tuple[int, int]]] = {}
        for name, tokens, chunks in scored:
            found.setdefault(name, set()).add((tokens, chunks))
        texts = []
        for corpus in corpora:
            counts = found.get(corpus.name, set())
            tokens, chunks = counts.pop() if len(counts) == 1 else (0, 0)
            texts.append(MeasuredText(corpus.name, corpus.bytes, corpus.sha256, tokens, chunks))
        return cls(
            corpora=tuple(texts),
            contexts=tuple(contexts) or (conditions.ctx,),
            engine=ENGINE,
            threads=conditions.threads or default_threads(),
            kv_type=conditions.kv_type,
            rope=conditions.rope,
            reference=reference,
            devices=tuple(dict.fromkeys(devices)),
        )

    @property
    def caption(self) -> str:
        """Sentences for below a table."""
        sentences = []
        for text in self.corpora:
            scored = ""
            if text.tokens:
                scored = f": {text.tokens:,} tokens scored in {_chunks(text.chunks)} of {self.contexts[0]}"
            sentences.append(f"{text.name} (sha256 {text.sha256[:12]}…){scored}.")
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        sentences.append(f"{', '.join((self.engine, threads, *self._unusual))}.")
        if self.reference:
            sentences.append(f"ΔPPL and KLD against {self.reference}.")
        return " ".join(sentences)

    @property
    def fields(self) -> dict[str, str]:
        """Names and values, for a report."""
        fields: dict[str, str] = {}
        for index, text in enumerate(self.corpora, 1):
            number = "" if len(self.corpora) == 1 else f" {index}"
            fields[f"Corpus{number}"] = text.name
            fields[f"SHA-256{number}"] = text.sha256
            if text.tokens:
                fields[f"Scored{number}"] = f"{text.tokens:,} tokens in {_chunks(text.chunks)}"
        fields["Context"] = ", ".join(map(str, self.contexts))
        fields["Engine"] = self.engine
        fields["Threads"] = str(self.threads)
        if self._unusual:
            fields["Settings"] = ", ".join(self._unusual)
        if self.reference:
            fields["Reference"] = self.reference
        return fields

    @property
    def _unusual(self) -> tuple[str, ...]:
        """The settings that are not the engine's own."""
        found = [f"layers on {' and '.join(self.devices)}"] if self.devices else []
        if self.kv_type != "f16":
            found.append(f"KV cache {self.kv_type}")
        if self.rope is None:
            return tuple(found)
        words = {
            "RoPE scaling": self.rope.kind,
            "factor": self.rope.factor,
            "RoPE base": self.rope.freq_base,
            "NTK factor": self.rope.ntk_factor,
        }
        told = (f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in words.items() if value)
        return (*found, *told)


def _chunks(count: int) -> str:
    return f"{count:,} chunk{'s' if count > 1 else ''}"
