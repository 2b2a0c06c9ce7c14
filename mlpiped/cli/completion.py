"""Shell completion, generated from an argparse parser: nothing to keep in step by hand.

All three scripts work alike: walk the words so far to find the verb ("place", `/compute/drain`), then offer what fits
there. An option's value is offered as files, as its choices, or not at all.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path

from mlpiped.errors import UnknownName

SHELLS = ("bash", "zsh", "fish")
_FILE_WORD = re.compile(r"\b(FILE|DIR|DEST|PATH|SOCKET)\b|\.py\b")


@dataclass(frozen=True, slots=True)
class _Option:
    strings: tuple[str, ...]
    help: str
    value: bool  # takes one
    choices: tuple[str, ...]
    files: bool


@dataclass(slots=True)
class _Place:
    """What may follow a path of verbs: `""`, `/serve`, `/compute/drain`."""

    path: str
    options: list[_Option] = field(default_factory=list)
    verbs: list[tuple[str, str]] = field(default_factory=list)  # name, help
    choices: list[str] = field(default_factory=list)  # of its positional arguments
    files: bool = False


def script(parser: argparse.ArgumentParser, prog: str, shell: str) -> str:
    """The completion script for `prog`, to be sourced or installed. Raises UnknownName for another shell."""
    if shell not in SHELLS:
        raise UnknownName.among("shell", shell, SHELLS)
    places = list(_walk(parser, ""))
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](places, prog)


def _walk(parser: argparse.ArgumentParser, path: str) -> list[_Place]:
    place = _Place(path)
    below: list[_Place] = []
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
        if isinstance(action, argparse._SubParsersAction):
            helps = {a.dest: a.help or "" for a in action._choices_actions}
            for name, sub in action.choices.items():
                if name in helps:  # aliases and hidden verbs are not offered, but are followed
                    place.verbs.append((name, _line(helps[name])))
                below.extend(_walk(sub, f"{path}/{name}"))
        elif action.option_strings:
            place.options.append(_option(parser, action))
        else:
            place.choices.extend(map(str, action.choices or ()))
            place.files = place.files or _wants_file(action)
    return [place, *below]


def _option(parser: argparse.ArgumentParser, action: argparse.Action) -> _Option:
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return _Option(
        strings=tuple(action.option_strings),
        help=_line(text),
        value=action.nargs != 0,
        choices=tuple(map(str, action.choices or ())),
        files=_wants_file(action),
    )


def _wants_file(action: argparse.Action) -> bool:
    metavar = action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar or ())
    return action.nargs != 0 and not action.choices and (action.type is Path or bool(_FILE_WORD.search(metavar)))


def _line(text: str) -> str:
    return " ".join(text.split())


def _quote(text: str) -> str:
    """For bash and zsh."""
    return "'" + text.replace("'", "'\\''") + "'"


def _function(prog: str) -> str:
    return "_" + re.sub(r"\W", "_", prog)


def _paths(places: list[_Place]) -> list[str]:
    return [place.path for place in places if place.path]


def _values(places: list[_Place]) -> list[tuple[str, _Option]]:
    """`place:option` of each option that takes a value."""
    return [(f"{p.path}:{s}", o) for p in places for o in p.options if o.value for s in o.strings]


def _bash(places: list[_Place], prog: str) -> str:
    name = _function(prog)
    out = [
        f"# bash completion for {prog}",
        f"{name}() {{",
        '    local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" place="" words="" files="" i',
        "    COMPREPLY=()",
    ]
    if paths := _paths(places):
        out += [
            "    for ((i = 1; i < COMP_CWORD; i++)); do",
            '        case "$place/${COMP_WORDS[i]}" in',
            f'            {"|".join(map(_quote, paths))}) place="$place/${{COMP_WORDS[i]}}" ;;',
            "        esac",
            "    done",
        ]
    out += ['    case "$place:$prev" in']
    for key, option in _values(places):
        action = "files=only" if option.files else f"words={_quote(' '.join(option.choices))}; files=none"
        out.append(f"        {_quote(key)}) {action} ;;")
    out += ["        *)", '            case "$place" in']
    for place in places:
        words = [n for n, _ in place.verbs] + place.choices + [s for o in place.options for s in o.strings]
        files = "; files=also" if place.files else ""
        out.append(f"                {_quote(place.path)}) words={_quote(' '.join(words))}{files} ;;")
    out += [
        "            esac ;;",
        "    esac",
        '    [[ $files == also && $cur == -* ]] && files=""',
        '    [[ -n $words ]] && mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")',
        "    if [[ $files == also || $files == only ]]; then",
        "        local found",
        "        compopt -o filenames 2>/dev/null",
        '        mapfile -t found < <(compgen -f -- "$cur")',
        '        [[ -n $cur || -z $words ]] && COMPREPLY+=("${found[@]}")',
        "    fi",
        "    return 0",
        "}",
        f"complete -F {name} {prog}",
    ]
    return "\n".join(out) + "\n"


def _described(pairs: list[tuple[str, str]]) -> str:
    return " ".join(_quote(f"{name.replace(':', chr(92) + ':')}:{text}" if text else name) for name, text in pairs)


def _zsh(places: list[_Place], prog: str) -> str:
    name = _function(prog)
    out = [f"#compdef {prog}", f"{name}() {{", "    local place='' i", "    local -a verbs options values"]
    out += ["    local files=''"]
    if paths := _paths(places):
        out += [
            "    for ((i = 2; i < CURRENT; i++)); do",
            '        case "$place/${words[i]}" in',
            f'            ({"|".join(map(_quote, paths))}) place="$place/${{words[i]}}" ;;',
            "        esac",
            "    done",
        ]
    out += ['    case "$place:${words[CURRENT-1]}" in']
    for key, option in _values(places):
        if option.files:
            action = "_files; return"
        elif option.choices:
            action = f"values=({' '.join(map(_quote, option.choices))}); _describe value values; return"
        else:
            action = "return"
        out.append(f"        ({_quote(key)}) {action} ;;")
    out += ["    esac", '    case "$place" in']
    for place in places:
        verbs = place.verbs + [(choice, "") for choice in place.choices]
        options = [(s, o.help) for o in place.options for s in o.strings]
        out.append(f"        ({_quote(place.path)})")
        out.append(f"            verbs=({_described(verbs)})")
        out.append(f"            options=({_described(options)})")
        out.append(f"            {'files=yes' if place.files else ':'} ;;")
    out += [
        "    esac",
        "    if [[ $PREFIX == -* ]]; then",
        "        _describe -o option options",
        "        return",
        "    fi",
        "    (( $#verbs )) && _describe argument verbs",
        "    [[ -n $files ]] && _files",
        "    return 0",
        "}",
        f'if [[ "$funcstack[1]" == {name} ]]; then {name} "$@"; else compdef {name} {prog}; fi',
    ]
    return "\n".join(out) + "\n"


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _fish(places: list[_Place], prog: str) -> str:
    at = f"_{_function(prog)}_at"
    out = [
        f"# fish completion for {prog}",
        f"function {at}",
        "    set -l place ''",
        "    for word in (commandline -opc)[2..-1]",
        '        switch "$place/$word"',
        f"            case {' '.join(map(_fish_quote, _paths(places) or ['/']))}",
        '                set place "$place/$word"',
        "        end",
        "    end",
        '    test "$place" = "$argv[1]"',
        "end",
        f"complete -c {prog} -f",
    ]
    for place in places:
        head = f"complete -c {prog} -n {_fish_quote(f'{at} {_fish_quote(place.path)}')}"
        for verb, text in [*place.verbs, *((choice, "") for choice in place.choices)]:
            out.append(f"{head} -a {_fish_quote(verb)}" + (f" -d {_fish_quote(text)}" if text else ""))
        if place.files:
            out.append(f"{head} -F")
        out.extend(f"{head} {_fish_option(option)}" for option in place.options)

    return "\n".join(out) + "\n"


def _fish_option(option: _Option) -> str:
    parts = [f"-l {s[2:]}" if s.startswith("--") else f"-s {s[1:]}" for s in option.strings]
    if option.value:
        parts.append("-r -F" if option.files else "-x")
    if option.choices:
        parts.append(f"-a {_fish_quote(' '.join(option.choices))}")
    if option.help:
        parts.append(f"-d {_fish_quote(option.help)}")
    return " ".join(parts)
