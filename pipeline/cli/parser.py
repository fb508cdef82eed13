"""Command line parser: click commands built from the tables of verbs and options, and shell completion.

A value comes from the option, otherwise from the environment variable of the same name; empty counts as absent.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

from models.errors import BadRequest
from pipeline.cli import typed
from pipeline.cli.options import Option
from pipeline.cli.request import Request
from pipeline.cli.values import alternatives, nearest, pick
from pipeline.cli.verbs import RULES, VERBS, Verb

PROGRAM: Final = "python -m pipeline"
_COMMAND, _INSTRUCTION = "edgeline", "_EDGELINE_COMPLETE"  # names in shells with completion
_ROOT: Final = Path(__file__).parent.parent.parent
_SHELLS: Final = ("bash", "zsh", "fish")
_WIDTH = 100  # columns of help, at most
_WIDEST = 80  # columns of the choices of an option beside its name; longer lists are part of its text
_SETTINGS: Final = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": _WIDTH,
    "token_normalize_func": lambda token: token.replace("_", "-"),  # --max_drop is --max-drop
}


class Shown(Exception):
    """Text to print instead of a result: help, or a completion script."""


def parse(arguments: Sequence[str] | None = None) -> Request:
    """Parse a command line, by default that of this process, whose make variables are checked too.

    Raises BadRequest if the command line is invalid, Shown if it requests help or a completion script.
    """
    if arguments is None and (instruction := os.environ.get(_INSTRUCTION)):
        shell_complete(group(), {}, _COMMAND, _INSTRUCTION, instruction)
        raise Shown
    try:
        request = group().main(
            sys.argv[1:] if arguments is None else list(arguments), prog_name=PROGRAM, standalone_mode=False
        )
    except click.UsageError as error:
        raise BadRequest(_sentence(error)) from error
    if not isinstance(request, Request):
        raise Shown
    if arguments is None:
        typed.judge([request.verb])
    return request


def group() -> click.Group:
    """Return the command with all verbs as subcommands."""
    commands = [_command(verb) for verb in VERBS.values()]
    return _Verbs(
        name=PROGRAM,
        commands={str(command.name): command for command in (*commands, _completion(), _check_variables())},
        help="Train, quantize, compile, verify and measure vision models on edge devices.",
        epilog=f"Options of a verb: {PROGRAM} VERB --help. The last line of stdout is one JSON object; the log is on "
        "stderr. Exit codes: 0 done, 2 invalid request, 3 not possible on this machine, 4 a check failed.",
        no_args_is_help=False,
        params=[_version()],
        options_metavar="",
        subcommand_metavar="VERB [OPTIONS]",
        context_settings=dict(_SETTINGS),
    )


class _Helped(click.Command):
    """A command that raises Shown with its help, so that the program can print it even if stdout is closed. Its errors
    have the context of the command.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        return click.Option(
            self.get_help_option_names(ctx),
            is_flag=True,
            is_eager=True,
            expose_value=False,
            help="Show this text.",
            callback=lambda context, _option, requested: _show_help(context, requested),
        )


def _version() -> click.Option:
    return click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        help="Show the version.",
        callback=lambda _context, _option, requested: _show_version(requested),
    )


def _show_version(requested: bool) -> None:
    if requested:
        import tomllib

        project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
        raise Shown(f"{project['name']} {project['version']}")


def _show_help(context: click.Context, requested: bool) -> None:
    if requested and not context.resilient_parsing:
        raise Shown(context.get_help())


class _Verbs(_Helped, click.Group):
    """The group of verbs; its help has a section for each group of verbs."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0].replace("_", "-")
        command = self.commands.get(name)
        if command is None and not ctx.resilient_parsing:
            pick("verb", args[0], VERBS)
        return name, command, args[1:]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading in dict.fromkeys(verb.group for verb in VERBS.values()):
            with formatter.section(heading):
                formatter.write_dl([(verb.name, verb.help) for verb in VERBS.values() if verb.group == heading])
        with formatter.section("Shell"):
            formatter.write_dl([("completion", "Print a script that completes the command `edgeline` in a shell.")])


class _VerbCommand(_Helped):
    """The command of a verb; its help has a section for each group of options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                heading = parameter.heading if isinstance(parameter, _Declared) else "Other"
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class _Declared(click.Option):
    """The click option of a declared `Option`."""

    def __init__(self, option: Option[Any]) -> None:
        choices = f"[{'|'.join(option.choices)}]"
        few = len(choices) <= _WIDEST
        super().__init__(
            [option.flag],
            envvar=option.name,
            default=option.default,
            show_default=bool(option.default),
            show_envvar=True,
            metavar=choices if option.choices and few else option.metavar,
            help=option.help if few else f"{option.help} Values: {', '.join(option.choices)}.",
        )
        self.option, self.heading = option, option.group

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        if self.option.kind != "plain":
            return [CompletionItem(incomplete, type=self.option.kind)]
        values = (*self.option.choices, *self.option.complete())
        return [CompletionItem(value) for value in values if value.startswith(incomplete)]


def _command(verb: Verb) -> click.Command:
    store = click.Option(
        ["--store"],
        default="build",
        show_default=True,
        metavar="FOLDER",
        help="Folder of artifacts and measurements.",
        shell_complete=lambda _context, _parameter, incomplete: [CompletionItem(incomplete, type="dir")],
    )

    def callback(store: str = "build", **given: str) -> Request:
        texts = {option.name: given[option.name.lower()].strip() or option.default for option in verb.options}
        return Request(
            verb=verb.name,
            texts={**texts, **verb.fixed},
            store=Path(store.strip() or "build"),
            inherited=typed.inherited(filter(_is_from_environment, texts)),
        )

    return _VerbCommand(
        verb.name,
        callback=callback,
        params=[*map(_Declared, verb.options), *[store] * verb.store],
        help=verb.help,
        epilog=_epilog(verb),
    )


def _is_from_environment(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name.lower())
    return source is click.core.ParameterSource.ENVIRONMENT


def _epilog(verb: Verb) -> str | None:
    if not verb.options:
        return None
    name = verb.options[0].name
    return f"With make, variables take the place of options: make {verb.name} {name}=..."


def _completion() -> click.Command:
    def callback(shell: str) -> NoReturn:
        if shell not in _SHELLS:
            raise BadRequest(f"completion {shell}: no such shell; expected {alternatives(_SHELLS)}")
        raise Shown(_script(shell))

    return _Helped(
        "completion",
        callback=callback,
        params=[click.Argument(["shell"], metavar="|".join(_SHELLS))],
        help="Print a script that defines the command `edgeline` in a shell, with completion of verbs, options and "
        f'values: eval "$({PROGRAM} completion bash)".',
    )


def _script(shell: str) -> str:
    """Return the script that defines the shell function `edgeline` with click's completion.

    click expects an executable; the script calls the Python interpreter instead.
    """
    completion = get_completion_class(shell)
    assert completion is not None
    python, root = shlex.quote(sys.executable), shlex.quote(str(_ROOT))
    program = f"env PYTHONPATH={root} {python} -m pipeline"
    body = f"function {_COMMAND}; {program} $argv; end" if shell == "fish" else f'{_COMMAND}() {{ {program} "$@"; }}'
    source = completion(group(), {}, _COMMAND, _INSTRUCTION).source()
    source = source.replace(f"$+commands[{_COMMAND}]", f"$+functions[{_COMMAND}]")
    for called in (f"{shell}_complete $1", f"{shell}_complete {_COMMAND}", f"(commandline -t) {_COMMAND}"):
        source = source.replace(called, f"{called.rpartition(' ')[0]} {program}")
    return f"{body}\n{source}"


def _check_variables() -> click.Command:
    """Return the command that checks the variables of Makefile rules that are not verbs."""

    def callback(rules: tuple[str, ...]) -> NoReturn:
        typed.judge(rules)
        read = [option for rule in rules for option in RULES.get(rule, ())]
        with typed.naming_origin(typed.inherited(option.name for option in read)):
            for option in read:
                if text := os.environ.get(option.name, "").strip():
                    option.parse(option.name, text)
        raise Shown

    return _Helped("check-variables", callback=callback, params=[click.Argument(["rules"], nargs=-1)], hidden=True)


def _sentence(error: click.UsageError) -> str:
    """Return one sentence for a click error, with the most similar option and the command that lists the options."""
    command = error.ctx.command_path if error.ctx else PROGRAM
    listing = f"`{command} --help` lists"
    if error.ctx is None or isinstance(error.ctx.command, click.Group):
        return f"expected a verb; {listing} the verbs"
    if isinstance(error, click.NoSuchOption):
        known = [name for parameter in error.ctx.command.get_params(error.ctx) for name in parameter.opts]
        close = nearest(error.option_name, known)
        hint = f"did you mean {close}? " if close else ""
        return f"{error.option_name}: no such option; {hint}{listing} the options"
    if isinstance(error, click.BadOptionUsage):
        return f"{error.option_name}: expected a value; {listing} the options"
    message = error.format_message().rstrip(".")
    return f"{message[:1].lower()}{message[1:]}; {listing} the options"
