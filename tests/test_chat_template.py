"""Chat templates: rendered as transformers does, and hostile ones an error in bounded time."""

import time

import pytest

from mlacli import template_worker
from mlacli.chat_template import (
    ChatTemplate,
    TemplateError,
    built_in,
    built_in_names,
    chosen_template,
)
from mlacli.errors import MlacliError, UsageError
from mlacli.flags_generation import CHAT

TOKENS = {"bos_token": "<BOS>", "eos_token": "<EOS>"}
USER = {"role": "user", "content": "Why is “the sky” blue?\n"}
ANSWER = {"role": "assistant", "content": "Rayleigh\nscattering."}
SYSTEM = {"role": "system", "content": "Be brief."}
THOUGHTFUL = {"role": "assistant", "content": "Blue.", "reasoning_content": "\nhm, light\n"}
TAGGED = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nBlue."}
CHATS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ANSWER, USER],
    "alike": [USER, ANSWER, USER, ANSWER, USER],
    "thought": [USER, THOUGHTFUL, USER],
    "last thought": [USER, ANSWER, USER, THOUGHTFUL],
    "tags": [USER, TAGGED, USER],
}


def render(source, messages, **variables):
    return ChatTemplate(source, "a test's", TOKENS | variables).render(messages)


def render_here(source, messages, **variables):
    """The same in this process, which saves its start."""
    given = {"messages": messages, "tools": None, "documents": None} | TOKENS | variables
    return template_worker.render(source, given | {"add_generation_prompt": True})


@pytest.mark.parametrize("name", built_in_names())
def test_built_in_templates_render_as_in_transformers(name):
    """apply_chat_template ends in this function."""
    reason = "transformers is not installed"
    theirs = pytest.importorskip("transformers.utils.chat_template_utils", reason=reason)
    for label, chat in CHATS.items():
        variables = TOKENS | ({"thinking": True, "enable_thinking": False} if "t" in label else {})
        expected, _ = theirs.render_jinja_template(
            [chat], chat_template=built_in(name), add_generation_prompt=True, **variables
        )
        assert render_here(built_in(name), chat, **variables) == expected[0], label


S, U, A = "Be brief.", USER["content"], ANSWER["content"]
WRITTEN = {
    "chatml": f"<|im_start|>system\n{S}<|im_end|>\n<|im_start|>user\n{U}<|im_end|>\n"
    f"<|im_start|>assistant\n{A}<|im_end|>\n<|im_start|>user\n{U}<|im_end|>\n"
    "<|im_start|>assistant\n",
    "deepseek2": f"<BOS>{S}\n\nUser: {U}\n\nAssistant: {A}<EOS>User: {U}\n\nAssistant:",
    "deepseek3": f"<BOS>{S}<｜User｜>{U}<｜Assistant｜>{A}<｜end▁of▁sentence｜>"
    f"<｜User｜>{U}<｜Assistant｜>",
    "deepseek3.1": f"<BOS>{S}<｜User｜>{U}<｜Assistant｜></think>{A}<｜end▁of▁sentence｜>"
    f"<｜User｜>{U}<｜Assistant｜></think>",
    "glm4": f"[gMASK]<sop><|system|>\n{S}<|user|>\n{U}<|assistant|>\n{A}<|user|>\n{U}<|assistant|>",
    "glm5": f"[gMASK]<sop><|system|>{S}<|user|>{U}<|assistant|></think>{A}<|user|>{U}"
    "<|assistant|><think>",
    "kimi-k2": f"<|im_system|>system<|im_middle|>{S}<|im_end|><|im_user|>user<|im_middle|>{U}"
    f"<|im_end|><|im_assistant|>assistant<|im_middle|>{A}<|im_end|><|im_user|>user<|im_middle|>{U}"
    "<|im_end|><|im_assistant|>assistant<|im_middle|>",
    "mistral-v3-tekken": f"<BOS>[INST]{U}[/INST]{A}<EOS>[INST]{S}\n\n{U}[/INST]",
    "mistral-v7": f"<BOS>[SYSTEM_PROMPT]{S}[/SYSTEM_PROMPT][INST]{U}[/INST]{A}<EOS>"
    f"[INST]{U}[/INST]",
}


@pytest.mark.parametrize("name", built_in_names())
def test_built_in_templates_give_the_models_formats(name):
    assert render_here(built_in(name), CHATS["turns"]) == WRITTEN[name]


def test_thoughts_of_earlier_answers_are_left_out():
    for name in ("deepseek3", "deepseek3.1", "glm5"):
        text = render_here(built_in(name), CHATS["tags"])
        assert "hm" not in text and "Blue." in text
    assert "<think>hm, light</think>Blue." in render_here(built_in("glm5"), CHATS["last thought"])
    assert "light" not in render_here(built_in("glm5"), CHATS["thought"])


SYNTAX = """\
{%- macro part(m) %}
    [{{ m.role }}]
{%- endmacro -%}
{% for m in messages %}
    {% if loop.index0 == 2 %}{% break %}{% endif %}
    {{- part(m) }} {{ {'a': m.content, "é": [1, none, true]} | tojson }}
    {% generation %}{{ m.content | trim }}{% endgeneration %}
{% endfor %}
{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 2 %}{{ ns.n }} {{ dict(a=1).items() | list }}
{{ tools is none }} {{ documents is none }} {{ strftime_now('%Y') | length }} {{ undefined_name }}
{{ messages | map(attribute='role') | join(',') }} {{ 'x'.join(['a', 'b']) }} {{ bos_token }}
"""


def test_everything_templates_use_renders_as_in_transformers():
    theirs = pytest.importorskip("transformers.utils.chat_template_utils")
    expected, _ = theirs.render_jinja_template(
        [CHATS["turns"]], chat_template=SYNTAX, add_generation_prompt=True, **TOKENS
    )
    assert render_here(SYNTAX, CHATS["turns"]) == expected[0]
    assert render(SYNTAX, CHATS["turns"]) == expected[0]
    assert "[system]" in expected[0] and "[assistant]" not in expected[0]


HOSTILE = {
    "a long loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a long text": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "much memory": "{{ ('a' * 10 ** 10) | length }}",
    "a large number": "{{ 10 ** (10 ** 9) }}",
    "a wide field": "{{ '%2000000000d' | format(1) | length }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a function's globals": "{{ strftime_now.__globals__['datetime'] }}",
    "attributes by filter": "{{ (messages | attr('__class__')).__mro__ }}",
    "a format string": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "an include": "{% include '/etc/passwd' %}",
    "changed messages": "{{ messages.append(1) }}",
    "a namespace": "{% set n = namespace(__class__=1) %}{{ n }}",
    "an odd syntax": "{% for %}",
    "a refusal": "{{ raise_exception('roles must alternate') }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_an_error_in_bounded_time(name):
    began = time.monotonic()
    with pytest.raises(TemplateError, match="a test's") as e:
        render(HOSTILE[name], [USER])
    assert time.monotonic() - began < 60, "the bound is 20 s beside start and a busy machine"
    assert "--chat-template" in e.value.hint and "\n" not in e.value.message
    if name == "a refusal":
        assert "roles must alternate" in e.value.message


def test_a_template_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr("mlacli.chat_template._WALL_SECONDS", 0.01)
    with pytest.raises(TemplateError, match="takes too long"):
        render("x", [USER])


def test_a_giant_template_is_not_even_tried():
    with pytest.raises(TemplateError, match="characters"):
        render("x" * (1 << 21), [USER])


def test_the_help_names_all_built_in_templates():
    flag = next(f for f in CHAT if f.key == "chat_template")
    assert flag.help.endswith(": " + ", ".join(built_in_names()))


def test_which_template_is_taken(tmp_path):
    file = {"tokenizer.chat_template": "from the file"}
    variables = {"bos_token": "B"}
    assert chosen_template(file, None, None, variables).source == "from the file"
    assert chosen_template({}, None, None, variables) is None
    assert chosen_template(file, "glm5", None, variables).source == built_in("glm5")
    assert chosen_template(file, "chatglm4", None, variables).source == built_in("glm4")
    text = chosen_template(file, "{{ bos_token }}", None, variables)
    assert text.render([]) == "B"
    path = tmp_path / "own.jinja"
    path.write_text("of a file")
    assert chosen_template(file, None, str(path), variables).source == "of a file"
    with pytest.raises(MlacliError, match="can't read"):
        chosen_template(file, None, str(tmp_path / "missing"), variables)
    with pytest.raises(UsageError, match="'kimi'") as e:
        chosen_template(file, "kimi", None, variables)
    assert "kimi-k2" in e.value.hint
