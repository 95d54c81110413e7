"""How byte-level BPE splits a text into words: tokenizer.json's definition → llama.cpp's name for it.

llama.cpp carries the splitting rules of the models it knows, by name (`tokenizer.ggml.pre`). A rule is recognised
by what tokenizer.json says, brought into one form: the regular expressions in the order they are applied. The
expressions are those of the published tokenizers; the tests compare each row with llama.cpp, token by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmix.errors import InputError, UsageError
from localmix.sources.documents import shown

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

# What ByteLevel itself splits by, as GPT-2 did.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _gpt4(numbers: str, letters: str = r"\p{L}+", marks: str = r"\p{L}\p{N}") -> str:
    """The expression of GPT-4, which many have changed in one place."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{letters}|{numbers}| ?[^\s{marks}]+[\r\n]*|{_SPACES}"


def _cased(end: str, numbers: str) -> str:
    """The expression of GPT-4o and Tekken, which keeps upper and lower case apart."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{lead}{upper}*{lower}+{end}|{lead}{upper}+{lower}*{end}"
    return rf"{words}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_CODE_AND_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_HAN = "[一-龥ࠀ-一가-퟿]+"
_HAN_AND_KANA = "[一-龥぀-ゟ゠-ヿ]+"
# Escapes stand for letters that editors and version control like to replace by their composed forms.
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄ"
    "ῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_LLM = (r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _HAN)
_ONE_DIGIT, _DIGITS = r"\p{N}", r"\p{N}+"
_CONTIGUOUS_PUNCTUATION = "Punctuation, contiguous"
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"


@dataclass(frozen=True)
class PreTokenizer:
    """One way to split.

    Attributes:
        name: llama.cpp's `tokenizer.ggml.pre`.
        steps: regular expressions in the order they are applied; what they match stands alone.
        whole_words: a word that is a token is not built from merges (`ignore_merges`).
    """

    name: str
    steps: tuple[str, ...]
    whole_words: bool = False


# Several of llama.cpp's names split alike; the row has the one that keeps spaces when tokens become text again.
PRE_TOKENIZERS: tuple[PreTokenizer, ...] = (
    PreTokenizer("llama-bpe", (_gpt4(r"\p{N}{1,3}"),), whole_words=True),
    PreTokenizer("dbrx", (_gpt4(r"\p{N}{1,3}"),)),
    PreTokenizer("gpt-2", (_GPT2,)),
    PreTokenizer("qwen2", (_gpt4(r"\p{N}"),)),
    PreTokenizer("qwen35", (_gpt4(r"\p{N}", r"[\p{L}\p{M}]+", r"\p{L}\p{M}\p{N}"),)),
    PreTokenizer("gpt-4o", (_cased(_CONTRACTIONS + "?", r"\p{N}{1,3}"),)),
    PreTokenizer("tekken", (_cased("", r"\p{N}"),), whole_words=True),
    PreTokenizer("smollm", (_ONE_DIGIT, _GPT2)),
    PreTokenizer("deepseek-llm", (*_DEEPSEEK_LLM, _ONE_DIGIT)),
    PreTokenizer("deepseek-llm", (*_DEEPSEEK_LLM, _DIGITS)),
    PreTokenizer("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, _ONE_DIGIT)),
    PreTokenizer("deepseek-v3", (r"\p{N}{1,3}", _HAN_AND_KANA, _CODE_AND_WORDS)),
    PreTokenizer("falcon", (_CONTIGUOUS_PUNCTUATION, _GPT2, _DIGITS, "[0-9][0-9][0-9]")),
    PreTokenizer("bloom", (_BLOOM,)),
    PreTokenizer("viking", (_BLOOM, _ONE_DIGIT)),
    PreTokenizer("minicpm5", (r"\p{N}{1,3}", _gpt4(r"\p{N}+")), whole_words=True),
)

# What llama.cpp accepts at the pin (src/llama-vocab.cpp): the choice for `--pre`.
_NAMES = (
    "a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r dbrx "
    "deepseek-coder deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4 f2llmv2 falcon "
    "falcon-h1 falcon3 gemma4 gigachat glm4 glm5 gpt-2 gpt-4o gpt3-finnish granite-docling granite-embed-multi-311m "
    "granite-embed-multi-97m grok-2 hunyuan hunyuan-dense hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code "
    "jina-v2-de jina-v2-es jina-v5-nano joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe llama-v3 "
    "llama3 llama4 megrez mellum mellum2 midm-2.0 minerva-7b minicpm5 minimax-m2 modern-bert mpt olmo phi-2 pixtral "
    "poro-chat qwen2 qwen35 refact roberta-bpe sarvam-moe seed-coder smaug-bpe smollm solar-open spark2_5 stablelm2 "
    "starcoder superbpe talkie tekken tiny_aya trillion ufakzeka viking whitespace youtu"
)
NAMES = frozenset(_NAMES.split())


def check_name(name: str) -> None:
    """Raise UsageError for a pre-tokenizer that llama.cpp does not have."""
    if name not in NAMES:
        raise UsageError(f"llama.cpp has no pre-tokenizer {shown(name)}.", f"It has {', '.join(sorted(NAMES))}.")


def recognise(path: Path, document: Mapping[str, Any], whole_words: bool) -> str:
    """llama.cpp's name for the way that a tokenizer.json splits.

    Args:
        path: the file, for messages.
        document: its content.
        whole_words: its model's `ignore_merges`.

    Raises:
        InputError: llama.cpp does not split like this, or nobody here knows.
    """
    _refuse_normalizer(path, document.get("normalizer"))
    steps = _steps(document.get("pre_tokenizer"))
    for row in PRE_TOKENIZERS:
        if steps == row.steps and whole_words == row.whole_words:
            return row.name
    told = "; ".join(shown(step) for step in steps) if steps else shown(document.get("pre_tokenizer"))
    if any(steps == row.steps for row in PRE_TOKENIZERS):
        told += f", with ignore_merges {str(whole_words).lower()}"
    raise _unknown(f"{path} splits a text in a way that is not known here: {told}.")


def _unknown(problem: str) -> InputError:
    return InputError(
        problem,
        "If you know which of llama.cpp's pre-tokenizers the model uses, name it: `localmix convert --pre NAME`.",
    )


def _refuse_normalizer(path: Path, block: Any) -> None:
    """Refuse changes to the text that llama.cpp would not make; composing it (NFC) leaves most texts as they are."""
    kinds = [step.get("type") for step in members(block, "normalizers")]
    if any(kind != "NFC" for kind in kinds):
        raise _unknown(f"{path} changes a text before it is split: {shown(', '.join(map(str, kinds)))}.")


def members(block: Any, name: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre_tokenizer or post_processor, sequences in sequences included, in order."""
    if not isinstance(block, dict):
        return []
    if block.get("type") != "Sequence":
        return [block]
    inner = block.get(name)
    return [step for item in (inner if isinstance(inner, list) else []) for step in members(item, name)]


def puts_space(metaspace: Mapping[str, Any]) -> bool:
    """Whether a Metaspace step puts a space before a text; older files say it by a switch."""
    return bool(
        metaspace.get("prepend_scheme", "always" if metaspace.get("add_prefix_space", True) else "never") != "never"
    )


def _steps(block: Any) -> tuple[str, ...] | None:
    """A byte-level pre_tokenizer as regular expressions in order; None if it is something else."""
    found: list[str] = []
    byte_level = False
    for step in members(block, "pretokenizers"):
        kind = step.get("type")
        if kind == "ByteLevel" and not byte_level and not step.get("add_prefix_space", True):
            byte_level = True
            found += [_GPT2] if step.get("use_regex", True) else []
        elif kind == "Digits":
            found.append(_ONE_DIGIT if step.get("individual_digits") else _DIGITS)
        elif kind == "Punctuation" and step.get("behavior", "Isolated") == "Contiguous":
            found.append(_CONTIGUOUS_PUNCTUATION)
        elif kind == "Split" and (expression := _isolated(step)) is not None:
            found.append(expression)
        else:
            return None
    return tuple(found) if byte_level else None


def _isolated(step: Mapping[str, Any]) -> str | None:
    """The expression of a Split whose matches stand alone; None if they do not."""
    pattern = step.get("pattern")
    expression = pattern.get("Regex") if isinstance(pattern, dict) else None
    # To remove what lies between the matches of an expression that matches every character is the same.
    manner = (step.get("behavior"), bool(step.get("invert")))
    if not isinstance(expression, str) or manner not in (("Isolated", False), ("Removed", True)):
        return None
    for character, escape in (("\r", r"\r"), ("\n", r"\n"), ("\t", r"\t")):
        expression = expression.replace(character, escape)
    return expression
