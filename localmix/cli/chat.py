"""`localmix chat`: one question, or a conversation at the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localmix.cli.chat_settings import LIMIT, setting_options
from localmix.cli.console import Console
from localmix.cli.memory_check import placement_options, rpc_option
from localmix.cli.parameters import FILE, MODEL, examples, json_option, rope_options, threads_option

if TYPE_CHECKING:
    from localmix.conversation.chat import Conversation, Engine
    from localmix.conversation.chat_events import DraftSettings
    from localmix.conversation.session import Keeper, Session
    from localmix.distribution.protocol import Endpoint
    from localmix.native.devices import Device
    from localmix.rope_scaling import RopeScaling

_QUESTION_BYTES = 4 * 2**20  # more is no question: a wrong file, or a program that never ends
_TEXT_BYTES = 2**20  # of a template, a grammar or a schema
_MOST_DRAFTED = 64


@click.command()
@click.argument("model", metavar="[MODEL]", type=MODEL, required=False)
@click.option("-p", "--prompt", metavar="TEXT", help="Ask one thing and leave; - reads it from stdin.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--continue", "go_on", is_flag=True, help="Go on with the last conversation.")
@click.option("--session", "session_name", metavar="NAME", help="Go on with this conversation, or start it.")
@click.option("--no-save", is_flag=True, help="Keep nothing of the conversation.")
@click.option("--raw", is_flag=True, help="Write replies as they are, also on a terminal.")
@click.option(
    "--ctx",
    "context",
    type=click.IntRange(16, 2**31 - 1),
    help="Positions of context; 4096 by default, less if the model was trained for less.",
)
@setting_options
@click.option(
    "--chat-template",
    metavar="FILE",
    help="Use this Jinja template, or the one of this name where the model brings several.",
)
@click.option("--draft", metavar="MODEL|ngram", help="Speculative decoding: a smaller model, or a look at the context.")
@click.option("--draft-tokens", metavar="auto|N", default="auto", show_default=True, help="Tokens proposed at a time.")
@click.option("--json-schema", type=FILE, metavar="FILE", help="With -p: the reply is JSON that follows this schema.")
@click.option("--grammar", type=FILE, metavar="FILE", help="With -p: the reply follows this grammar (GBNF).")
@placement_options
@rpc_option
@rope_options
@threads_option
@click.option("--force", is_flag=True, help="Load the model even if memory seems too small.")
@json_option
@examples(
    "localmix chat",
    "localmix chat tinymix:Q4_K --continue",
    'localmix chat -p "Where does Wilma live?" --json',
    "cat question.txt | localmix chat mixtral.gguf",
    "localmix chat mixtral --draft ngram --kv-type q8_0",
)
def command(
    model: str | None,
    prompt: str | None,
    system: str | None,
    go_on: bool,
    session_name: str | None,
    no_save: bool,
    raw: bool,
    context: int | None,
    settings: dict[str, Any],
    chat_template: str | None,
    draft: str | None,
    draft_tokens: str,
    json_schema: Path | None,
    grammar: Path | None,
    device: str,
    gpu_layers: int | None,
    experts: str,
    kv_type: str,
    rpc: tuple[Endpoint, ...],
    rope: RopeScaling | None,
    threads: int | None,
    force: bool,
    json: bool,
) -> None:
    """Talk to a model in the terminal.

    Enter sends, Alt-Enter starts a new line, /help lists the commands. Ctrl-C stops a reply and keeps the
    conversation; at the prompt it leaves. Every turn is saved. With a pipe on stdin one question is read from
    there.
    """
    from localmix.errors import UsageError

    console = Console(json)
    for option, text in (("--prompt", prompt), ("--system", system)):
        if text is not None and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UsageError(f"The text of {option} is not UTF-8.")
    if go_on and session_name is not None:
        raise UsageError("--continue and --session name two conversations.", "Use one of them.")
    question = _question(prompt)
    if json and question is None:
        raise UsageError("--json needs one question.", "Give it with -p, or on stdin.")
    shape = _grammar(grammar, json_schema, question)
    template, template_name = _template(chat_template)

    with contextlib.ExitStack() as stack:
        from localmix.conversation.chat import Conversation, Engine, EngineSettings, start_child

        # it gets llama.cpp ready while this process imports the rest and looks at the model
        children = [stack.enter_context(start_child())]

        from localmix import library
        from localmix.cli.chat_terminal import Talk, load, restore
        from localmix.cli.chat_turn import prepare_drawing
        from localmix.cli.memory_check import MemoryCheck
        from localmix.conversation import session

        drafting = _draft(draft, draft_tokens)
        remote: tuple[Device, ...] = ()
        if rpc:
            from localmix.distribution.machines import Machines
            from localmix.native.devices import PROCESSOR

            remote = stack.enter_context(Machines(rpc)).devices
            if drafting is not None:
                drafting = dataclasses.replace(drafting, placement=PROCESSOR)

        def open_engine(name: str | Path | None) -> Engine:
            check = MemoryCheck(
                console,
                context,
                kv_type=kv_type,
                device=device,
                gpu_layers=gpu_layers,
                experts=experts,
                draft=drafting.model if drafting else None,
                remote=remote,
            )
            path = library.resolve(name, library.Purpose.RUN, check.fits)
            choice = check.check(path, force)
            return Engine(
                path,
                EngineSettings(
                    context=choice.context,
                    threads=threads,
                    placement=choice.placement,
                    repack=choice.repack,
                    kv_type=choice.kv_type,
                    rope=rope,
                    draft=drafting,
                    chat_template=template,
                    template_name=template_name,
                ),
                children.pop() if children else None,
            )

        keeper = stack.enter_context(session.Keeper(saving=not no_save))
        found = _session(console, keeper, go_on, session_name)
        engine = open_engine(model if model is not None or found is None else _model_of(found))
        conversation = Conversation(engine, grammar=shape)
        stack.callback(lambda: conversation.engine.close())  # /model puts another one there
        chosen = restore(conversation, found) if found else {}
        chosen |= {field: value for field, value in settings.items() if field != LIMIT}
        conversation.limit = settings.get(LIMIT, conversation.limit)
        if system is not None:
            conversation.system = system
        prepare_drawing(raw)
        load(console, engine, session.state_path(found.name) if found else None)
        library.remember(engine.path)
        talk = Talk(console, conversation, keeper, open_engine, chosen, raw)
        if question is None:
            talk.run()
            return
        _answer_once(console, conversation, question, raw)
        if go_on or session_name is not None:
            talk.save()


def _question(prompt: str | None) -> str | None:
    """The one question to ask, or None for a conversation."""
    from localmix.errors import InputError, UsageError

    if prompt is not None and prompt != "-":
        text = prompt
    elif prompt == "-" or not sys.stdin.isatty():
        try:
            data = sys.stdin.buffer.read(_QUESTION_BYTES + 1)
            if len(data) > _QUESTION_BYTES:
                raise InputError(f"The question on stdin is longer than {_QUESTION_BYTES // 2**20} MiB.")
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"The question on stdin is not UTF-8 (byte {error.start}).") from error
    else:
        return None
    if not text.strip():
        raise UsageError("The question is empty.", 'Ask with -p "TEXT", or on stdin.')
    return text.strip()


def _grammar(grammar: Path | None, schema: Path | None, question: str | None) -> str | None:
    """The GBNF that the reply is to follow."""
    from localmix.errors import UsageError

    if grammar is None and schema is None:
        return None
    if grammar is not None and schema is not None:
        raise UsageError("--grammar and --json-schema exclude each other.")
    if question is None:
        raise UsageError(f"{'--grammar' if grammar else '--json-schema'} needs one question.", "Give it with -p.")
    if grammar is not None:
        return _text(grammar, "grammar")
    assert schema is not None
    return _schema_grammar(schema)


def _schema_grammar(path: Path) -> str:
    import json

    from localmix.conversation.grammar import from_json_schema
    from localmix.errors import InputError

    try:
        schema = json.loads(_text(path, "schema"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"The schema {path} is no JSON: {error}.") from error
    return from_json_schema(schema)


def _template(spec: str | None) -> tuple[str | None, str | None]:
    """The source of a template, and the name of one of the model's own: one of them, or neither."""
    if spec is None:
        return None, None
    path = Path(spec)
    # a bare name that is no file: the model may have a template of that name
    if not path.exists() and path.name == spec and not path.suffix:
        return None, spec
    return _text(path, "chat template"), None


def _text(path: Path, what: str) -> str:
    from localmix.errors import InputError
    from localmix.output import file_error

    try:
        with path.open("rb") as file:
            data = file.read(_TEXT_BYTES + 1)
    except OSError as error:
        raise file_error(error, path, "read") from error
    if len(data) > _TEXT_BYTES:
        raise InputError(f"The {what} {path} is longer than {_TEXT_BYTES // 2**20} MiB.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"The {what} {path} is no UTF-8 text (byte {error.start}).") from error


def _draft(spec: str | None, tokens: str) -> DraftSettings | None:
    from localmix import library
    from localmix.conversation.chat_events import DraftSettings
    from localmix.errors import UsageError

    if tokens != "auto" and not (tokens.isascii() and tokens.isdigit() and 1 <= int(tokens) <= _MOST_DRAFTED):
        raise UsageError(f"--draft-tokens {tokens}: neither auto nor a number from 1 to {_MOST_DRAFTED}.")
    if spec is None:
        if tokens != "auto":
            raise UsageError("--draft-tokens needs --draft.", "Name a smaller model, or ngram.")
        return None
    path = None if spec == "ngram" else library.resolve(spec, library.Purpose.RUN)
    draft = DraftSettings(model=path)
    return draft if tokens == "auto" else dataclasses.replace(draft, length=int(tokens), adaptive=False)


def _session(console: Console, keeper: Keeper, go_on: bool, name: str | None) -> Session | None:
    """The conversation to go on with, or None for a new one."""
    from localmix.conversation import session
    from localmix.errors import UsageError

    if go_on:
        known = session.find(lambda error: console.warn(f"{error.message} {error.hint}"))
        if not known:
            raise UsageError("No conversation was saved yet.", "Start one with `localmix chat`.")
        name = known[0].name
    return keeper.open(name) if name is not None else None


def _model_of(found: Session) -> Path | None:
    """The file that a conversation was led with."""
    from localmix.errors import InputError

    path = Path(found.model)
    if found.model and not path.exists():
        raise InputError(
            f"The conversation {found.name} was led with {path}, which is gone.",
            f"Go on with another model: `localmix chat MODEL --session {shlex.quote(found.name)}`.",
        )
    return path if found.model else None


def _answer_once(console: Console, conversation: Conversation, question: str, raw: bool) -> None:
    """One turn: the reply on stdout, or as a document when JSON was asked for."""
    from localmix.cli.chat_turn import comment, show_reply

    reply = show_reply(console, conversation.ask(question), raw=raw, quiet=console.json)
    comment(console, reply)
    console.result(
        {
            "model": conversation.engine.path,
            "text": reply.text,
            "prompt_tokens": reply.prompt_tokens,
            "cached_tokens": reply.cached_tokens,
            "completion_tokens": reply.completion_tokens,
            "context_used": reply.context_used,
            "finish_reason": reply.finish_reason,
            "first_token_seconds": reply.first_token_seconds,
            "pp_tps": reply.pp_tps,
            "tg_tps": reply.tg_tps,
            "drafted": reply.drafted,
            "accepted": reply.accepted,
            "acceptance": reply.acceptance,
            "speedup": reply.speedup,
        },
        lambda: None,
    )
