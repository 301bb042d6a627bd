"""Text from a GGUF file (or the bundled model): python generate.py [FILE] [PROMPT]."""

import sys

import mlacli


def main(path: str | None = None, prompt: str = "Once upon a time") -> None:
    with mlacli.load(path, device="cpu,cpu", split_mode="graph", temp=0) as engine:
        print(prompt, end="")
        for piece in engine.generate(prompt, n_predict=48):
            print(piece, end="", flush=True)
        print()
        if engine.timings.n_decoded:
            speed = engine.timings.n_decoded / engine.timings.decode_s
            print(f"{speed:.0f} tokens a second", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
