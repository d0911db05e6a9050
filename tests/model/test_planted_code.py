"""A checkpoint's own code is never run: neither what its auto_map names, nor a pickle that lies in it."""

import json
import pickle
from pathlib import Path

import pytest

from harness.__main__ import main
from harness.config.refusal import Refusal
from harness.config.settings import Model
from harness.model.loader import model_config

SHAPE = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
CLASSES = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")


class _Touch:
    """A pickle that makes a file where it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.file,)


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A checkpoint with code and a pickle in it, each of which makes the file `ran` beside the checkpoint."""
    checkpoint, ran = tmp_path / "checkpoint", tmp_path / "ran"
    checkpoint.mkdir()
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
    for name in ("planted", "modeling_llama", "json", "torch", "sitecustomize"):
        (checkpoint / f"{name}.py").write_text(code)
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(_Touch(ran)))
    write(checkpoint, "llama")
    own = {
        "tokenizer_class": "Planted",
        "auto_map": {"AutoTokenizer": ["planted.Planted", "planted.Planted"]},
    }
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(own))
    return checkpoint


def write(checkpoint: Path, kind: str) -> None:
    auto_map = dict.fromkeys(CLASSES, "planted.Planted")
    shape = {"model_type": kind, "architectures": ["Planted"], **SHAPE, "auto_map": auto_map}
    (checkpoint / "config.json").write_text(json.dumps(shape))


def test_the_config_s_auto_map_is_not_run(planted: Path) -> None:
    assert type(model_config(Model(path=str(planted)))).__module__.startswith("transformers.")
    write(planted, "planted")
    with pytest.raises(Refusal, match=r"custom code \(auto_map\), which is never run"):
        model_config(Model(path=str(planted)))
    assert not (planted.parent / "ran").exists()


@pytest.mark.parametrize("more", [(), ("model.random=true",)], ids=["weights", "random"])
def test_a_request_to_generate_from_it_runs_none_of_it(
    planted: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    words = ["mode=infer", f"model.path={planted}", "hardware=cpu", "generation.max_new_tokens=2", *more]
    code = main([*words, "world=rehearsed", "world.size=1", f"hydra.run.dir={planted.parent}/run"])
    assert code in (0, 2)
    assert "Traceback" not in capsys.readouterr().err
    assert not (planted.parent / "ran").exists()
