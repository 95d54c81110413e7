"""export: a Modelfile, with which Ollama runs a GGUF file as it is meant to be run.

Ollama has Go templates where the model has a Jinja one. What a Jinja template puts around the turns is found out by
rendering conversations with it; where that explains every one of them, a Go template is written that gives the same
text. Syntax: https://docs.ollama.com/modelfile and https://docs.ollama.com/template
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from localmix.conversation.chat_template import HINT, render
from localmix.errors import InputError, LocalmixError, UsageError
from localmix.sampling import Sampling, own_sampling
from localmix.sources.gguf import GGUFFile
from localmix.worker import Channel, Worker

CONTEXT = 4096
TEMPLATE_SECONDS = 5.0

_TEMPLATE = "tokenizer.chat_template"
_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp, llama_token_attr of tokenizer.ggml.token_type

# Our settings by Ollama's names.
_PARAMETERS: Mapping[str, str] = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repeat_penalty",
    "repeat_last_n": "repeat_last",
}

# Texts that no template looks for; each stands for one message.
_SYSTEM, _USERS, _ANSWERS = "Zqsystem", ("Zquserone", "Zqusertwo", "Zquserthree"), ("Zqanswerone", "Zqanswertwo")

Message = dict[str, str]


@dataclass(frozen=True)
class TurnFormat:
    """What a chat template writes around the messages of a conversation.

    Attributes:
        start: before the first message of the user.
        system: before and after a system message, which stands in the place of `start`; None where there is none.
        ask: after the user's last message: here the model begins to write.
        answer: after an earlier message of the user, before the answer to it.
        turn: after an answer, before the next message of the user.
    """

    start: str
    system: tuple[str, str] | None
    ask: str
    answer: str
    turn: str


@dataclass(frozen=True)
class Modelfile:
    """A Modelfile.

    Attributes:
        text: what to write.
        template: whether it has one.
        parameters: as it sets them; several for `stop`.
        notes: what could not be carried over.
    """

    model: Path
    text: str
    template: bool
    parameters: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def ollama(model: Path, *, system: str | None = None, context: int | None = None) -> Modelfile:
    """The Modelfile of a GGUF file.

    Args:
        system: a system prompt to set.
        context: positions; without it 4096, or what the model was trained for when that is less.

    Raises:
        InputError: the file is none that Ollama loads; the chat template takes for ever.
        UsageError: a text has three quotes in a row, which no Modelfile can hold.
    """
    with closing(GGUFFile(model)) as source:
        if source.repairs:
            raise InputError(f"llama.cpp does not load {model}, nor does Ollama.", f"Run `localmix convert {model}`.")
        if len(source.files()) > 1:
            raise InputError(f"{model} is split, and Ollama takes one file.", f"Run `localmix quantize COPY {model}`.")
        metadata = {key: value.value for key, value in source.metadata.items()}
        trained = source.number("{arch}.context_length")
    notes: list[str] = []
    turns = _turns(metadata, model, notes)
    blocks = [f"FROM {_quoted(str(model.resolve()), 'The path')}"]
    if turns is not None:
        blocks.append(f"TEMPLATE {_quoted(go_template(turns), 'The chat template', always=True)}")
    if system:
        blocks.append(f"SYSTEM {_quoted(system, 'The system prompt', always=True)}")
        if turns is not None and turns.system is None:
            notes.append("The chat template leaves a system prompt out, and so does Ollama's.")
        if any(not (character.isprintable() or character in "\t\r\n") for character in system):
            notes.append(
                "Ollama drops unprintable characters of the system prompt, and spaces other than the plain one."
            )
    parameters = [("num_ctx", str(context or min(trained or CONTEXT, CONTEXT)))]
    settings = Sampling.for_model(own_sampling({key: str(value) for key, value in metadata.items()}))
    parameters += [(name, f"{getattr(settings, field):g}") for name, field in _PARAMETERS.items()]
    if turns is not None:
        parameters += [("stop", stop) for stop in stops(turns, _special_tokens(metadata))]
    blocks.append(
        "\n".join(
            f"PARAMETER {name} {_quoted(value, 'A text to stop at', always=name == 'stop')}"
            for name, value in parameters
        )
    )
    return Modelfile(model, "\n\n".join(blocks) + "\n", turns is not None, tuple(parameters), tuple(notes))


def _quoted(text: str, what: str, always: bool = False) -> str:
    """A value as a Modelfile holds it; nothing is escaped there.

    Raises:
        UsageError: it cannot be held.
    """
    plain = text.isprintable() and text == text.strip() and not text.startswith('"')
    if plain and not always:
        return text
    if '"""' in text:
        raise UsageError(f"{what} has three quotes in a row, where a Modelfile ends it.", "Change the text.")
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'


def _token_text(metadata: Mapping[str, Any], key: str) -> str:
    tokens, number = metadata.get("tokenizer.ggml.tokens"), metadata.get(key)
    if isinstance(tokens, list) and type(number) is int and 0 <= number < len(tokens):
        return str(tokens[number])
    return ""


def _special_tokens(metadata: Mapping[str, Any]) -> list[str]:
    """Texts of the tokens that are no text, the longest first."""
    tokens, kinds = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(kinds, list):
        return []
    found = [str(token) for token, kind in zip(tokens, kinds, strict=False) if kind in (_CONTROL, _USER_DEFINED)]
    return sorted(filter(str.strip, found), key=len, reverse=True)


def _turns(metadata: Mapping[str, Any], model: Path, notes: list[str]) -> TurnFormat | None:
    template = metadata.get(_TEMPLATE)
    if not isinstance(template, str):
        notes.append(f"{model.name} has no chat template: Ollama passes on what is typed.")
        return None
    bos, eos = (_token_text(metadata, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    if any("\ud800" <= character <= "\udfff" for character in template + bos + eos):
        notes.append("No TEMPLATE is written: the chat template, or a token in it, is not UTF-8.")
        return None
    try:
        turns = _in_a_child(template, bos, eos, model)
    except InputError as error:
        notes.append(f"No TEMPLATE is written: {error.message}")
        return None
    if turns is None:
        notes.append(
            "No TEMPLATE is written: the chat template does more than to put something around each turn."
            " Ollama may know one for this model; check with `ollama show --template`."
        )
    if "strftime_now" in template and turns is not None:
        notes.append("The chat template writes the day's date; in the Modelfile it stays today's.")
    return turns


# --- the format of the turns -----------------------------------------------------------------


def find_turns(prompt: Callable[[Sequence[Message]], str]) -> TurnFormat | None:
    """What stands around the messages, if nothing else decides about it than their order.

    Args:
        prompt: a conversation as the prompt for its next message.

    Raises:
        Whatever `prompt` raises for a conversation of user and assistant.
    """
    one, two, three = _USERS
    pieces = _around(prompt([_user(one)]), [one])
    longer = _around(prompt([_user(one), _assistant(_ANSWERS[0]), _user(two)]), [one, _ANSWERS[0], two])
    if pieces is None or longer is None:
        return None
    turns = TurnFormat(pieces[0], None, pieces[1], longer[1], longer[2])
    try:
        with_system = _around(prompt([_system(), _user(one)]), [_SYSTEM, one])
    except LocalmixError:
        with_system = None
    if with_system is not None:
        turns = TurnFormat(turns.start, (with_system[0], with_system[1]), turns.ask, turns.answer, turns.turn)
    probes: list[list[Message]] = [
        [_user(one)],
        [_user(one), _assistant(_ANSWERS[0]), _user(two)],
        [_user(one), _assistant(_ANSWERS[0]), _user(two), _assistant(_ANSWERS[1]), _user(three)],
        [_user("Two\nlines, “quotes” and 中文."), _assistant("# So\n\n- it is"), _user("1 + 1 = ?")],
    ]
    if turns.system is not None:
        probes += [[_system(), *probe] for probe in probes]
    return turns if all(prompt(probe) == write_turns(turns, probe) for probe in probes) else None


def write_turns(turns: TurnFormat, messages: Sequence[Message]) -> str:
    """A conversation in a format."""
    text = turns.start
    if messages[0]["role"] == "system" and turns.system is not None:
        text = turns.system[0] + messages[0]["content"] + turns.system[1]
    spoken = [message for message in messages if message["role"] != "system"]
    for number, message in enumerate(spoken, 1):
        after_user = turns.ask if number == len(spoken) else turns.answer
        after = turns.turn if message["role"] == "assistant" else after_user
        text += message["content"] + after
    return text


def _around(text: str, contents: Sequence[str]) -> list[str] | None:
    """What stands before, between and after the contents; None unless each is there once, in this order."""
    pieces = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found or content in text:
            return None
        pieces.append(before)
    return [*pieces, text]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _system() -> Message:
    return {"role": "system", "content": _SYSTEM}


def _in_a_child(template: str, bos: str, eos: str, model: Path) -> TurnFormat | None:
    """`find_turns` where the template can be killed: it is somebody's program.

    Raises:
        InputError: it fails, or takes for ever.
    """
    expired = threading.Event()
    with Worker(_find_turns, template, bos, eos, subject=model) as worker:
        try:
            for _ in worker:  # the child is ready: from here on the template runs
                with _deadline(worker.pid, expired):
                    for _ in worker:
                        pass
        except Exception as error:
            if expired.is_set():
                raise InputError(f"the chat template takes longer than {TEMPLATE_SECONDS:g} seconds.", HINT) from error
            raise
        found: TurnFormat | None = worker.result
        return found


def _find_turns(channel: Channel, template: str, bos: str, eos: str) -> TurnFormat | None:
    def prompt(messages: Sequence[Message]) -> str:
        text = render(template, messages, bos=bos, eos=eos, name="the chat template")
        return text.removeprefix(bos) if bos else text  # Ollama puts it there itself

    channel.emit("ready")
    return find_turns(prompt)


@contextmanager
def _deadline(pid: int, expired: threading.Event) -> Iterator[None]:
    def kill() -> None:
        expired.set()
        try:
            psutil.Process(pid).kill()
        except psutil.Error:
            return

    timer = threading.Timer(TEMPLATE_SECONDS, kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# --- Go --------------------------------------------------------------------------------------


def go_template(turns: TurnFormat) -> str:
    """The format as a Go template over Ollama's `.System` and `.Messages`."""
    start = go_text(turns.start)
    if turns.system is not None:
        before, after = map(go_text, turns.system)
        start = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{start}{{{{ end }}}}"
    last = "eq (len (slice $.Messages $i)) 1"
    after_user = f"{{{{ if {last} }}}}{go_text(turns.ask)}{{{{ else }}}}{go_text(turns.answer)}{{{{ end }}}}"
    if turns.ask == turns.answer:
        after_user = go_text(turns.ask)
    # an answer that stands last is one that the model goes on with
    after_answer = f"{{{{ if not ({last}) }}}}{go_text(turns.turn)}{{{{ end }}}}"
    return (
        f"{start}{{{{ range $i, $_ := .Messages }}}}"
        f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{after_user}'
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{after_answer}{{{{ end }}}}{{{{ end }}}}'
    )


def go_text(text: str) -> str:
    """Text that a Go template writes as it is; what a Modelfile or the template would eat is written by its code."""
    parts = []
    for index, character in enumerate(text):
        brace = character == "{" and text[index + 1 : index + 2] in ("{", "")
        if brace or character in '"`' or not (character.isprintable() or character == "\n"):
            escaped = f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"
            parts.append(f'{{{{ "{escaped}" }}}}')
        else:
            parts.append(character)
    return "".join(parts)


def stops(turns: TurnFormat, special: Sequence[str]) -> list[str]:
    """Texts at which an answer ends: what follows an answer, and what begins the user's next message.

    Args:
        special: texts of the tokens that are no text, the longest first.
    """
    rest = turns.turn.strip()
    found: list[str] = []
    end = next((token for token in special if rest.startswith(token)), "")
    if end:
        found.append(end)
        rest = rest.removeprefix(end).strip()
        # Llama 2 begins each round anew
        start = next((token for token in special if token == "<s>" and rest.startswith(token)), "")
        rest = rest.removeprefix(start).strip()
    line = rest.split("\n", 1)[0].strip()
    return [*found, line] if line and line not in found else found
