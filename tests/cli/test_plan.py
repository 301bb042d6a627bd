"""plan prints what prepare() planned."""

import json


def test_table_on_stdout(mlacli, fake_model):
    done = mlacli("plan", "-m", "toy.gguf", "--vram", "80G,512M")
    assert done.code == 0
    assert done.out.splitlines()[0].split() == ["device", "total"]
    assert "1.5 GiB" in done.out and "output.weight" not in done.out
    assert not any(line.endswith(" ") for line in done.out.splitlines())
    assert fake_model.params.split.vram == (80 << 30, 512 << 20)
    assert "configuration:" in done.err
    assert not fake_model.weights_loaded


def test_verbose_lists_the_shards(mlacli, fake_model):
    assert "output.weight" in mlacli("plan", "-m", "toy.gguf", "-v").out


def test_json_on_stdout(mlacli, fake_model):
    done = mlacli("plan", "-m", "toy.gguf", "--json")
    assert json.loads(done.out) == {"n_ctx": 256}
