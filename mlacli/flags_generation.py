"""Flags of run-model alone: prompt, chat, sampler chain, prompt cache. A part of `flags.py`."""

from __future__ import annotations

from mlacli.flag_entry import Flag
from mlacli.flag_values import (
    breaker,
    choice,
    integer,
    json_object,
    logit_bias,
    not_negative,
    number,
    positive,
    sampler_letters,
    sampler_names,
    seed,
    text,
    token_ids,
)
from mlacli.params import SAMPLERS

PROMPT: tuple[Flag, ...] = (
    Flag(("-p", "--prompt"), text, "prompt", "TEXT"),
    Flag(
        ("-f", "--file"),
        text,
        "read the prompt from a file, - for stdin, which a pipe without -p and -f is read from too",
        "FILE",
    ),
    Flag(("--prompt-ids",), token_ids, "prompt as token ids, e.g. 1,2,3", "IDS"),
    Flag(
        ("-n", "--predict", "--n-predict"),
        integer(-2),
        "tokens to generate; -1 no limit, -2 until the context is full",
        "N",
        -1,
    ),
    Flag(("-e", "--escape"), None, r"expand \n, \t, \xNN in texts of the line (on by default)"),
    Flag(("--no-escape",), None, "leave escapes alone"),
    Flag(("--display-prompt",), None, "print the prompt too (on by default)"),
    Flag(("--no-display-prompt",), None, "don't print the prompt"),
    Flag(
        ("-r", "--reverse-prompt"),
        text,
        "end generating where TEXT comes up; may be repeated",
        "TEXT",
        (),
        repeats=True,
    ),
    Flag(("--ignore-eos",), None, "go on after an end-of-generation token"),
)

CHAT: tuple[Flag, ...] = (
    Flag(
        ("-cnv", "--conversation"),
        None,
        "chat; on without prompt where the file has a chat template. -p or -f is the first turn, "
        "stdin that is no terminal one turn a line",
    ),
    Flag(("-no-cnv", "--no-conversation"), None, "continue the prompt as it is"),
    Flag(("-sys", "--system-prompt"), text, "system message of a chat", "TEXT"),
    Flag(("-spf", "-sysf", "--system-prompt-file"), text, "read it from a file", "FILE"),
    Flag(("-st", "--single-turn"), None, "end the chat after one answer"),
    Flag(
        ("-i", "--interactive"),
        None,
        "take turns in a completion: after an answer, or where -r is met, more text is read",
    ),
    Flag(("-if", "--interactive-first"), None, "the same, text is read first"),
    Flag(
        ("-mli", "--multiline-input"),
        None,
        "a turn may have many lines and ends with a line that ends in \\; without, \\ at the end "
        "of a line goes on in the next",
    ),
    Flag(("--in-prefix",), text, "text put before each input of -i", "TEXT", ""),
    Flag(("--in-suffix",), text, "text put after each input of -i", "TEXT", ""),
    Flag(("--simple-io",), None, "no line editing, no colours"),
    Flag(
        ("--chat-template",),
        text,
        "instead of the file's, a jinja text or a built-in name: chatml, deepseek2, deepseek3, "
        "deepseek3.1, glm4, glm5, kimi-k2, mistral-v3-tekken, mistral-v7",
        "NAME",
    ),
    Flag(("--chat-template-file",), text, "read the template from a file", "FILE"),
    Flag(
        ("--chat-template-kwargs",),
        json_object,
        'variables for the template, e.g. {"enable_thinking": false}',
        "JSON",
        (),
    ),
    Flag(
        ("-rea", "--reasoning"),
        choice("on", "off", "auto"),
        "ask the template for thoughts or none, in the variables that templates know; auto: theirs",
        "WORD",
        "auto",
    ),
    Flag(
        ("--reasoning-format",),
        choice("auto", "none", "deepseek", "hidden", **{"deepseek-legacy": "none"}),
        "thoughts of an answer: none = left in it; deepseek = split off to stderr; hidden = not "
        "shown; auto = dimmed on a terminal, else as deepseek",
        "WORD",
        "auto",
    ),
)

SAMPLING: tuple[Flag, ...] = (
    Flag(("-s", "--seed"), seed, "seed; -1, the default, draws one", "N"),
    Flag(
        ("--samplers",),
        sampler_names,
        "samplers in order, separated by ;",
        "NAMES",
        SAMPLERS,
    ),
    Flag(
        ("--sampling-seq", "--sampler-seq"),
        sampler_letters,
        "the same by letters: e penalties, d dry, s top_n_sigma, k top_k, y typ_p, p top_p, "
        "m min_p, x xtc, t temperature",
        "LETTERS",
    ),
    Flag(("--temp", "--temperature"), number, "temperature; 0 or less is greedy", "T", 0.8),
    Flag(("--top-k",), integer(), "keep the K likeliest tokens; 0 or less keeps all", "K", 40),
    Flag(("--top-p",), number, "keep the likeliest tokens up to probability P", "P", 0.95),
    Flag(("--min-p",), number, "drop tokens under P times the likeliest", "P", 0.05),
    Flag(
        ("--typical", "--typical-p"),
        number,
        "keep tokens of typical surprise up to probability P; 1 = off",
        "P",
        1.0,
    ),
    Flag(
        ("--top-n-sigma", "--top-nsigma"),
        number,
        "keep tokens within N standard deviations of the best logit; 0 or less = off",
        "N",
        -1.0,
    ),
    Flag(
        ("--xtc-probability",),
        number,
        "how often all but the last of the tokens over --xtc-threshold go; 0 = off",
        "P",
        0.0,
    ),
    Flag(("--xtc-threshold",), number, "over 0.5 = off", "P", 0.1),
    Flag(
        ("--repeat-last-n",), integer(-1), "tokens that penalties look at; 0 = off, -1 = all",
        "N", 64,
    ),
    Flag(("--repeat-penalty",), positive, "divides logits of tokens seen; 1 = off", "X", 1.0),
    Flag(("--presence-penalty",), number, "taken off logits of tokens seen; 0 = off", "X", 0.0),
    Flag(("--frequency-penalty",), number, "the same for each time they were; 0 = off", "X", 0.0),
    Flag(("--dry-multiplier",), number, "penalty for going on repeating; 0 = off", "X", 0.0),
    Flag(("--dry-base",), number, "its growth per token of the repetition", "X", 1.75),
    Flag(("--dry-allowed-length",), integer(0), "tokens that may be repeated", "N", 2),
    Flag(("--dry-penalty-last-n",), integer(-1), "tokens it looks at; 0 = off, -1 = all", "N", -1),
    Flag(
        ("--dry-sequence-breaker",),
        breaker,
        "a text over which no repetition reaches, instead of newline, colon, quote and star; "
        "none = no breakers; may be repeated",
        "TEXT",
        (),
        repeats=True,
    ),
    Flag(
        ("--dynatemp-range",), not_negative,
        "temperature by the entropy, from --temp less X to --temp and X; 0 = off", "X", 0.0,
    ),
    Flag(("--dynatemp-exp",), number, "exponent of the entropy's share", "X", 1.0),
    Flag(
        ("--mirostat",), integer(0, 2),
        "1 or 2 = mirostat of that version instead of the other samplers; 0 = off", "N", 0,
    ),
    Flag(("--mirostat-lr",), number, "its learning rate", "X", 0.1),
    Flag(("--mirostat-ent",), number, "its target entropy, in bits", "X", 5.0),
    Flag(
        ("-l", "--logit-bias"),
        logit_bias,
        "ID+X or ID-X: added to a token's logit; ID-inf forbids it; may be repeated",
        "BIAS",
        (),
        repeats=True,
    ),
    Flag(("--grammar",), text, "GBNF grammar that the output must follow", "TEXT"),
    Flag(("--grammar-file",), text, "read it from a file", "FILE"),
    Flag(("-j", "--json-schema"), text, "JSON schema that the output must follow", "SCHEMA"),
    Flag(("-jf", "--json-schema-file"), text, "read it from a file", "FILE"),
)  # fmt: skip

SESSION: tuple[Flag, ...] = (
    Flag(
        ("--prompt-cache",),
        text,
        "keep the prompt's cache rows in a file, and take them from it where it begins alike",
        "FILE",
    ),
    Flag(("--prompt-cache-all",), None, "keep the answer's rows too, written at the end"),
    Flag(("--prompt-cache-ro",), None, "only read the file"),
    Flag(("--perf",), None, "print timings and memory at the end (on by default)"),
    Flag(("--no-perf",), None, "print no timings"),
)

WARMUP: tuple[Flag, ...] = (
    Flag(("--warmup",), None, "compute one token before anything is timed (on by default)"),
    Flag(("--no-warmup",), None, "start cold"),
)
