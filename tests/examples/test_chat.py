"""The chat example runs, and its second turn computes only what is new."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLES / "chat.py", *words],
        env={"PYTHONPATH": str(EXAMPLES.parent)}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


def test_two_turns() -> None:
    bundled = str(EXAMPLES.parent / "mlacli" / "bundled" / "tinytales-q8_0.gguf")
    done = run(bundled, "chatml")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("> And then?\n")
    assert first.startswith("> Tell me a story.\n") and len(first) > 40 and len(second) > 20
    news = re.findall(r"(\d+) of (\d+) tokens were new", done.stderr)
    assert news[0][0] == news[0][1] and int(news[1][0]) < int(news[1][1])


def test_without_a_template_it_says_so() -> None:
    done = run()
    assert done.returncode == 1 and "name a template" in done.stderr
