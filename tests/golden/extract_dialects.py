"""Writes mlacli/dialects/*.json: every option of llama.cpp's and ik_llama.cpp's parsers.

    python tests/golden/extract_dialects.py llama_cpp COMMIT common/arg.cpp
    python tests/golden/extract_dialects.py ik_llama_cpp COMMIT common/common.cpp common/log.h

Reads the sources as text; nothing is compiled. An option is [names, number of values,
environment variable].
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

OUT = Path(__file__).parents[2] / "mlacli" / "dialects"
REPOSITORIES = {"llama_cpp": "ggml-org/llama.cpp", "ik_llama_cpp": "ikawrakow/ik_llama.cpp"}

Option = tuple[list[str], int, str]

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)\'')
_COMMENT = re.compile(r'"(?:[^"\\]|\\.)*"|//[^\n]*')


def arguments(source: str, start: int) -> tuple[list[str], int]:
    """The top-level arguments of the call whose `(` ends before `start`, and where it ends."""
    depth, parts, begin, i = 1, [], start, start
    while depth:
        if quoted := _STRING.match(source, i):
            i = quoted.end()
            continue
        c = source[i]
        depth += (c in "({[") - (c in ")}]")
        if depth == 0 or (depth == 1 and c == ","):
            parts.append(source[begin:i].strip())
            begin = i + 1
        i += 1
    return parts, i


def strings(text: str) -> list[str]:
    return re.findall(r'"([^"]*)"', text)


def llama_cpp(source: str) -> Iterator[Option]:
    """Options of `add_opt(common_arg(...).set_env(...))`; the overload tells the value count."""
    for m in re.finditer(r"add_opt\(\s*common_arg\(", source):
        parts, end = arguments(source, m.end())
        chain, _ = arguments(source, end)  # .set_examples(...).set_env(...), up to add_opt's `)`
        names = strings(parts[0])
        negated = strings(parts[1]) if parts[1].startswith("{") else []
        assert names and len(parts) in (3, 4, 5), parts
        values = 0 if negated else len(parts) - 3
        env = re.search(r'set_env\("(LLAMA_[A-Z0-9_]+)"\)', chain[0])
        if "set_preset_only" not in chain[0]:
            yield [*names, *negated], values, env[1] if env else ""


def ik_llama_cpp(source: str, log: str) -> Iterator[Option]:
    """Options of the chain of `if (arg == ...)`; CHECK_ARG and ++i take a word each."""
    body = source[source.index("bool gpt_params_find_arg(") :]
    body = body[: body.index("\n}\n")]
    known = dict(re.findall(r'get_env\("(LLAMA_ARG_\w+)",\s*params\.(\w+)\)', source))
    env_of = {field: name for name, field in known.items()}
    heads = list(re.finditer(r"\n    (?:else )?if \(([^{\n]*)\) ?\{", body))
    for head, after in zip(heads, [*heads[1:], None], strict=True):
        names = re.findall(r'arg == "(-[^"]+)"', head[1])
        if not names:
            continue
        block = body[head.end() : after.start() if after else len(body)]
        block = block.partition("#ifndef LOG_DISABLE_LOGS")[0]
        values = block.count("CHECK_ARG") + len(re.findall(r"argv\[\+\+i\]", block))
        if not block.count("CHECK_ARG") and "++i >= argc" in block:
            values = 1
        field = re.search(r"params\.(\w+)\s*=", block)
        named = field and not any("-no" in n or n.endswith("-file") for n in names)
        yield names, values, env_of.get(field[1], "") if field and named else ""
    pairs = log[log.index("inline bool log_param_pair_parse") :]
    for name in dict.fromkeys(re.findall(r'"(--log-[a-z]+)"', log)):
        values = int(f'"{name}"' in pairs)
        yield [name], values, ""


def merged(options: Iterator[Option]) -> list[Option]:
    """One entry for options with the same names: a parser may list one again for some program."""
    found: dict[tuple[str, ...], Option] = {}
    for names, values, env in options:
        old = found.get(tuple(names), (names, values, env))
        assert values == old[1], f"{names} takes different values in different programs"
        found[tuple(names)] = (names, values, env or old[2])
    return sorted(found.values(), key=lambda option: option[0])


def without_comments(source: str) -> str:
    return _COMMENT.sub(lambda m: m[0] if m[0][0] == '"' else "", source)


def main() -> None:
    dialect, commit, *paths = sys.argv[1:]
    sources = [without_comments(Path(p).read_text()) for p in paths]
    extract = {"llama_cpp": llama_cpp, "ik_llama_cpp": ik_llama_cpp}[dialect]
    options = merged(extract(*sources))
    head = {
        "repository": REPOSITORIES[dialect],
        "commit": commit,
        "files": ["common/" + Path(p).name.removeprefix("ik_") for p in paths],
    }
    rows = ",\n  ".join(json.dumps(option) for option in options)
    text = json.dumps(head, indent=1)[:-2] + f',\n "options": [\n  {rows}\n ]\n}}\n'
    (OUT / f"{dialect}.json").write_text(text)
    n = len({name for option in options for name in option[0]})
    print(f"{dialect}: {len(options)} options, {n} names")


if __name__ == "__main__":
    main()
