"""An answer is cut the same way however it is pieced."""

import pytest

from mlacli.reasoning import ThoughtSplitter

CASES = {
    "<think>\nhm, a < b\n</think>\n\nBlue.\n": ("hm, a < b", "Blue.\n"),
    "\n <think>x</think>y": ("x", "y"),
    "[THINK]x</think>[/THINK] y": ("x</think>", "y"),
    "Blue. <think>no</think>": ("", "Blue. <think>no</think>"),
    " \n indented <thi": ("", " \n indented <thi"),
    "<think></think>\n\nz": ("", "z"),
    "<think>never ends </thi": ("never ends </thi", ""),
    "<thin": ("", "<thin"),
    "": ("", ""),
}


def split(text, cuts, prompt=""):
    splitter, found = ThoughtSplitter(prompt), {"thought": "", "answer": ""}
    at = 0
    for cut in [*cuts, len(text)]:
        for kind, piece in splitter.push(text[at:cut]):
            found[kind] += piece
        at = cut
    for kind, piece in splitter.flush():
        found[kind] += piece
    return found["thought"], found["answer"]


@pytest.mark.parametrize("text", CASES)
def test_every_way_of_piecing_it(text):
    expected = CASES[text]
    assert split(text, []) == expected
    assert split(text, range(len(text))) == expected
    for cut in range(len(text)):
        assert split(text, [cut]) == expected, cut


def test_a_thought_that_the_prompt_opened():
    prompt = "<｜Assistant｜><think>\n"
    for cuts in ([], range(12)):
        assert split("hm\n</think>\n\nYes", cuts, prompt) == ("hm", "Yes")
        assert split("<think>hm", cuts, prompt) == ("<think>hm", "")


def test_text_is_shown_as_soon_as_it_can_be():
    splitter = ThoughtSplitter("<think>")
    assert list(splitter.push("one two")) == [("thought", "one two")]
    assert list(splitter.push(" three</")) == [("thought", " three")]
    assert list(splitter.push("b> ")) == [("thought", "</b>")]
