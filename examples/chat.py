"""A chat of two turns from Python: python chat.py [FILE] [TEMPLATE], a built-in template's name."""

import sys

import mlacli
from mlacli.chat_template import chosen_template


def main(path: str | None = None, name: str | None = None) -> None:
    with mlacli.load(path, temp=0) as engine:
        tokenizer = engine.tokenizer
        metadata = engine.prepared.gguf.metadata
        template = chosen_template(metadata, name, None, {"bos_token": "", "eos_token": ""})
        if tokenizer is None or template is None:
            sys.exit("no tokenizer or no chat template in this file: name a template")
        messages = []
        for turn in ("Tell me a story.", "And then?"):
            messages.append({"role": "user", "content": turn})
            ids = tokenizer.encode(template.render(messages))
            answer = list(engine.generate_ids(ids, n_predict=24, reuse=True))
            text = tokenizer.decode(i for i in answer if i not in tokenizer.eog_ids)
            messages.append({"role": "assistant", "content": text})
            print(f"> {turn}\n{text}\n")
            print(f"{engine.timings.n_prompt} of {len(ids)} tokens were new", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
