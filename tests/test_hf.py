"""Llamas of transformers become runs and runs become Llamas of transformers, without a bit changed."""

import dataclasses
import json
import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image
from test_cli import fails

from jpeglm_jax import checkpoints, cli, codecs, hf, runs, sharding, tokenizer
from jpeglm_jax import config as configs
from jpeglm_jax.checkpoints import Checkpoints, Progress
from jpeglm_jax.config import Config, JpegConfig, MeshConfig
from jpeglm_jax.data import flags
from jpeglm_jax.model import Llama, in_dtype, rotary
from jpeglm_jax.sampling.generate import Request, generate
from jpeglm_jax.sampling.rules import Sampler

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

CODEC = JpegConfig(size=32)
FORMS = ("pytorch_model.bin", "pytorch_model.bin, sharded", "model.safetensors", "model.safetensors, sharded")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> bytes:
    """A vocabulary of the published kind, learned by the command that learns it."""
    folder = tmp_path_factory.mktemp("bpe")
    for index in range(40):
        Image.fromarray(flags.flag(index, 32)).save(folder / f"{index}.png")
    out = folder / "tokenizer.model"
    (folder / "config.py").write_text("from jpeglm_jax.config import Config\nconfig = Config()")
    options = ["--data.path", str(folder), "--data.holdout", "4", "--codec.size", "32", "--out", str(out)]
    cli.main(["tokenizer", str(folder / "config.py"), *options])
    return out.read_bytes()


def llama(seed: int = 0, **changes):
    """A Llama of transformers with weights that matter."""
    settings = {
        "vocab_size": 320,
        "hidden_size": 16,
        "intermediate_size": 22,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 600,
    }
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes)).eval()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1 if "norm" in name else 0, 0.2)
    return model


def save(model, folder: Path, form: str = "model.safetensors", vocabulary: bytes | None = None) -> Path:
    """As transformers wrote it, or as the versions did that wrote files of PyTorch."""
    size = "20KB" if "sharded" in form else "5GB"
    model.save_pretrained(folder, max_shard_size=size)
    if form.startswith("pytorch"):
        shards = sorted(folder.glob("*.safetensors"))
        names = {path.name: path.name.replace("model", "pytorch_model", 1).replace("safetensors", "bin") for path in shards}
        for path in shards:
            torch.save(safetensors.load_file(path), folder / names[path.name])
            path.unlink()
        if "sharded" in form:
            index = folder / "model.safetensors.index.json"
            values = json.loads(index.read_text())
            values["weight_map"] = {name: names[file] for name, file in values["weight_map"].items()}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(values))
            index.unlink()
    assert (len([*folder.glob("*.bin"), *folder.glob("*.safetensors")]) > 1) == ("sharded" in form)
    (folder / "tokenizer.model").write_bytes(vocabulary or tokenizer.Symbols(256).published())
    return folder


def imported(source: Path, run: Path) -> Path:
    hf.import_run(str(source), str(run), CODEC)
    on_copies(runs.read(run))
    return run


def on_copies(config: Config) -> None:
    """Sets a run to hold a copy of the model on each device: it decodes without collectives, which are slow on virtual ones."""
    config = dataclasses.replace(config, mesh=MeshConfig(data=8, fsdp=1))
    (Path(config.run) / "config.json").write_text(configs.to_json(config))


def exported(run: Path, folder: Path, dtype=None) -> Path:
    hf.export_run(str(run), str(folder), dtype)
    return folder


def tensors(folder: Path) -> dict:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in safetensors.load_file(path).items()}


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


TOKENS = np.random.default_rng(0).integers(3, 320, (8, 13)).astype(np.int32)


@pytest.mark.parametrize(
    "form, changes",
    zip(
        FORMS,
        [
            {},
            {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 500.0},
            {"hidden_size": 24, "head_dim": 10, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
            {"hidden_size": 40, "num_key_value_heads": 1, "head_dim": 14, "num_hidden_layers": 4},
        ],
    ),
)
def test_every_part_and_the_whole_give_the_numbers_of_transformers(form, changes, bpe, tmp_path):
    theirs = llama(**changes)
    run = imported(save(theirs, tmp_path / "hf", form, bpe), tmp_path / "run")
    assert (run / "tokenizer.model").read_bytes() == bpe
    config, ours, mesh, step = runs.load_model(run)
    assert step == 0 and config.model.dtype == "float32" and config.tokenizer == str(run / "tokenizer.model")

    outputs = {}
    parts = {"embedding": theirs.model.embed_tokens, "norm": theirs.model.norm}
    for number, layer in enumerate(theirs.model.layers):
        parts |= {f"attention {number}": layer.self_attn, f"mlp {number}": layer.mlp, f"layer {number}": layer}
    for name, part in parts.items():
        part.register_forward_hook(
            lambda _, __, out, name=name: outputs.update({name: out[0] if isinstance(out, tuple) else out})
        )
    with torch.no_grad():
        outputs["logits"] = theirs(torch.from_numpy(TOKENS).long()).logits

    @jax.jit
    def every_part(model, tokens_BT):
        rotation = rotary(np.arange(tokens_BT.shape[1])[None], model.config)
        x_BTD = model.embed(tokens_BT)
        outputs = {"embedding": x_BTD}
        for number in range(model.config.layers):
            block = jax.tree.map(lambda stacked, number=number: stacked[number], model.blocks)
            attended_BTD, _ = block.attention(block.attention_norm(x_BTD), rotation)
            outputs[f"attention {number}"] = attended_BTD
            outputs[f"mlp {number}"] = block.mlp(block.mlp_norm(x_BTD + attended_BTD))
            x_BTD, _ = block(x_BTD, rotation)
            outputs[f"layer {number}"] = x_BTD
        return outputs | {"norm": model.norm(x_BTD), "logits": model(tokens_BT)}

    with jax.set_mesh(mesh):
        found = every_part(ours, jax.device_put(TOKENS, jax.NamedSharding(mesh, sharding.BT)))
    assert found.keys() == outputs.keys()
    for name in found:
        np.testing.assert_allclose(found[name], outputs[name].numpy(), atol=1e-5, rtol=1e-5, err_msg=name)


def write_greedily(run: Path, prompt: np.ndarray, count: int) -> np.ndarray:
    """Ids of a prompt and of `count` more, or up to EOS, by our sampler without the grammar."""
    _, model, mesh, _ = runs.load_model(run)
    with jax.set_mesh(mesh):
        requests = [Request(prompt, 0, len(prompt) + count)]
        return generate(model, requests, Sampler(temperature=0), None, slots=1)[0].tokens


def test_greedy_continuations_are_equal_for_200_tokens(bpe, tmp_path):
    theirs = llama(seed=1, num_key_value_heads=2)
    run = imported(save(theirs, tmp_path / "hf", vocabulary=bpe), tmp_path / "run")
    prompt = np.array([1, 319, 77, 40, 5], np.int32)
    ids = theirs.generate(torch.from_numpy(prompt).long()[None], do_sample=False, max_new_tokens=200)[0].numpy()
    assert len(ids) == 205 and len(set(ids.tolist())) > 10
    assert write_greedily(run, prompt, 200).tolist() == ids.tolist()


@pytest.mark.parametrize("form, dtype, tied", zip(FORMS, ["float16", "bfloat16", "float32", "float16"], [0, 1, 1, 0]))
def test_theirs_to_ours_to_theirs_changes_no_bit(form, dtype, tied, bpe, tmp_path, monkeypatch):
    theirs = llama(tie_word_embeddings=bool(tied), num_key_value_heads=2).to(getattr(torch, dtype))
    save(theirs, tmp_path / "safetensors")
    run = imported(save(theirs, tmp_path / "hf", form, bpe), tmp_path / "run")
    assert {array.dtype.name for array in Checkpoints(run).arrays(0, hf._shapes(runs.read(run).model)).values()} == {dtype}
    monkeypatch.setattr(hf, "FILE_BYTES", 10_000)
    back = exported(run, tmp_path / "back")
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 2
    assert_same(tensors(back), tensors(tmp_path / "safetensors"))
    assert (back / "tokenizer.model").read_bytes() == bpe
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(back).state_dict(), theirs.state_dict())


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A run that was saved on a mesh of eight, and its model's arrays by name."""
    run = tmp_path_factory.mktemp("ours") / "run"
    config = tiny.config(run)
    config = dataclasses.replace(
        config,
        codec=CODEC,
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        model=dataclasses.replace(config.model, vocab_size=259, norm_eps=1e-2, rope_theta=500.0),
        data=dataclasses.replace(config.data, sequence_length=600, packing="rows"),
    )
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh), Checkpoints(run, config.train) as stored:
        model = tiny.model(vocab_size=259)  # whose weights do not depend on the rest
        stored.save(5, model, {"count": np.zeros(3)}, Progress(config, 5, {}), None)
        stored.wait()
    on_copies(config)
    return run, {name: np.asarray(array) for name, array in checkpoints.named(model).items()}


def test_ours_to_theirs_to_ours_changes_no_bit(ours, tmp_path):
    run, arrays = ours
    folder = exported(run, tmp_path / "hf")
    back = imported(folder, tmp_path / "back")
    stored = Checkpoints(back).arrays(0, arrays)
    for name, array in arrays.items():
        assert np.array_equal(stored[name].read().result(), array), name
    before, after = runs.read(run), runs.read(back)
    model = dataclasses.replace(before.model, remat=after.model.remat, attention=after.model.attention)  # as of here and now
    assert (after.codec, after.model, after.tokenizer) == (before.codec, model, "")
    assert (after.data.packing, after.data.sequence_length) == ("rows", 600)


def test_a_checkpoint_is_exported_by_its_directory_in_the_dtype_asked_for(ours, tmp_path):
    run, arrays = ours
    full = tensors(exported(run, tmp_path / "full"))
    for dtype in ("bfloat16", "float16"):
        cli.main(["export", f"{run}/checkpoints/5", str(tmp_path / dtype), "--dtype", dtype])
        cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in full.items()}
        assert_same(tensors(tmp_path / dtype), cast)
        assert json.loads((tmp_path / dtype / "config.json").read_text())["torch_dtype"] == dtype


def test_a_layer_is_stored_alone(ours):
    run, arrays = ours
    for name, array in Checkpoints(run).arrays(5, arrays).items():
        assert not name.startswith("blocks/") or array.chunk_layout.read_chunk.shape[0] == 1


def test_two_processes_write_what_one_writes(ours, tmp_path):
    run, _ = ours
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, Path(__file__).with_name("export_in_processes.py"), run, tmp_path / "two", "8000", str(port)]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"}
    processes = [subprocess.Popen([*command, str(index)], env=environment, stdout=subprocess.PIPE) for index in range(2)]
    written = [json.loads(process.communicate(timeout=100)[0].splitlines()[-1]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    # Each wrote files of weights, and not those of the other.
    names = {path.name for path in (tmp_path / "two").glob("*.safetensors")}
    assert set(written[0]) | set(written[1]) == names and not set(written[0]) & set(written[1]) and all(written)
    one = exported(run, tmp_path / "one")
    assert_same(tensors(tmp_path / "two"), tensors(one))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert_same(model.state_dict(), transformers.AutoModelForCausalLM.from_pretrained(one).state_dict())


@pytest.mark.parametrize("kind", ["bytes", "byte pairs"])
def test_transformers_continues_a_picture_with_the_bytes_that_our_sampler_writes(kind, ours, bpe, tmp_path):
    run = ours[0] if kind == "bytes" else imported(save(llama(seed=2), tmp_path / "hf", vocabulary=bpe), tmp_path / "run")
    folder = exported(run, tmp_path / "export")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    config = runs.read(run)
    codec, vocabulary = codecs.make(config.codec), tokenizer.load(config.tokenizer, 256)
    stream = codec.prefix(codec.encode(flags.flag(7, 32)), 0.5)
    text = "".join(chr(byte + 10240) for byte in stream.tolist())
    prompt = theirs(text, return_tensors="pt")
    assert prompt["input_ids"][0].tolist() == vocabulary.encode(stream, eos=False).tolist()
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=50)[0]
    spelled = theirs.decode(ids, skip_special_tokens=True)
    written = write_greedily(run, vocabulary.encode(stream, eos=False), 50)
    characters = [character for character in spelled if ord(character) >= 10240]
    assert bytes(ord(character) - 10240 for character in characters) == vocabulary.decode(written).tobytes()
    assert len(vocabulary.decode(written)) > len(stream) + 20


def test_the_model_card_says_what_the_model_is_and_its_program_runs(ours, tmp_path, monkeypatch):
    folder = exported(ours[0], tmp_path / "flags")
    card = (folder / "README.md").read_text()
    assert "# flags" in card and "JPEG 32x32, quality 25, 4:2:0" in card and "5 steps, 24,000 tokens" in card
    (program,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    variables = {}
    exec(program.replace("max_length=600", "max_length=30"), variables)
    # The tables are where they belong: a real stream in the place of what an untrained model wrote opens.
    codec = codecs.make(CODEC)
    assert Path("picture.jpg").read_bytes() == codec.to_file(np.frombuffer(variables["stream"], np.uint8))


def test_the_export_has_the_files_and_fields_of_a_llama(ours, tmp_path):
    folder = exported(ours[0], tmp_path / "hf")
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == names | {"tokenizer.model", "tokenizer_config.json"}
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.architectures == ["LlamaForCausalLM"] and config.max_position_embeddings == 600
    assert config.jpeglm["codec"]["size"] == 32
    ours = runs.read(ours[0]).model
    fields = config.to_dict() | {"rope_theta": config.rope_parameters["rope_theta"]}
    assert {name: fields[field] for name, field in hf.FIELDS.items()} == {name: getattr(ours, name) for name in hf.FIELDS}
    settings = transformers.GenerationConfig.from_pretrained(folder)
    assert (settings.bos_token_id, settings.eos_token_id, settings.do_sample) == (1, 2, True)
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without


def test_an_imported_run_writes_pictures_that_open_is_evaluated_and_trained_on(bpe, tmp_path, caplog):
    caplog.set_level("INFO")
    source, run = save(llama(seed=3).half(), tmp_path / "hf", "pytorch_model.bin", bpe), str(tmp_path / "run")
    cli.main(["import", str(source), run, "--codec.size", "32"])
    on_copies(runs.read(run))
    report = str(tmp_path / "report.json")
    options = ["--count", "8", "--temperature", "2", "--max-tokens", "90", "--out", str(tmp_path / "out"), "--json", report]
    cli.main(["sample", run, *options])
    assert json.loads(Path(report).read_text())["that open"] == 8
    folder = str(Path(tiny.config(tmp_path / "tiny").data.path))
    data = ["--data.path", folder, "--data.packing", "rows", "--data.sequence-length", "128", "--data.batch-size", "8"]
    lengths = ["--train.steps", "2", "--train.eval-every", "2", "--train.eval-batches", "1", "--train.sample-every", "0"]
    rates = ["--optim.learning-rate", "1e-5", "--optim.warmup-steps", "0"]
    cli.main(["train", run, *data, "--data.holdout", "5", *rates, *lengths])
    assert "begins with the model that was imported" in caplog.text
    before, after = (Checkpoints(run).arrays(step, ["embed_VD"])["embed_VD"].read().result() for step in (0, 2))
    assert after.dtype == np.float32 and 0 < np.abs(after - before).max() < 1e-4  # two small steps from there
    cli.main(["evaluate", run, "--count", "1", "--json", report])
    assert json.loads(Path(report).read_text())["samples_that_open"] == 1
    # From now on it is a run like any other.
    assert "data.holdout is 6, was 5" in fails("train", run, "--data.holdout", "6")
    exported(run, tmp_path / "export")
    assert "2 steps, 2,048 tokens" in (tmp_path / "export" / "README.md").read_text()


def test_a_model_is_loaded_in_the_type_that_its_products_cast_it_to(bpe, tmp_path):
    source = save(llama().half(), tmp_path / "hf", vocabulary=bpe)
    run = imported(source, tmp_path / "run")
    config, model, mesh, _ = runs.load_model(run)
    assert config.model.dtype == "bfloat16"
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: Llama(config.model, nnx.Rngs(0)))
        full = in_dtype(Checkpoints(run).model(0, abstract, mesh))
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(full), strict=True):
        assert ours.dtype == theirs.dtype and ours.sharding == theirs.sharding and np.array_equal(ours, theirs)


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | values).items() if v != "nothing"}))


class Code:
    """Code that a pickle runs when it is read."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def damage(folder: Path, how: str) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    if how == "shard":
        next(folder.glob("*-00002-*")).unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "truncated bin":
        path = folder / "pytorch_model.bin"
        path.write_bytes(path.read_bytes()[:-1000])
    elif how == "malicious":
        torch.save({"model.norm.weight": Code()}, folder / "pytorch_model.bin")
    elif how == "malicious, no zip":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Code()}))
    elif how == "numbers":
        torch.save({"step": 5}, folder / "pytorch_model.bin")
    elif how == "tokenizer":
        (folder / "tokenizer.model").write_bytes(tokenizer.Symbols(256).published())
    elif how == "no tokenizer":
        (folder / "tokenizer.model").unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how in ("tensors", "everything"):
        stored = safetensors.load_file(weights)
        stored["model.norm.weight"] = torch.ones(17)
        stored["model.layers.0.self_attn.q_proj.bias"] = torch.ones(16)
        stored["model.layers.1.mlp.up_proj.weight"] = torch.ones(22, 16).to(torch.float8_e4m3fn)
        del stored["lm_head.weight"]
        safetensors.save_file(stored, weights)
        if how == "everything":
            damage(folder, "tokenizer")
    elif how == "architecture":
        change(config, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=4096)
    elif how == "fields":
        change(config, attention_bias=True, hidden_act="gelu", eos_token_id=[2, 3], quantization_config={"bits": 4})
    elif how == "rope":
        change(config, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0})
    elif how == "old rope":
        change(config, rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters="nothing")
    elif how == "incomplete":
        change(config, hidden_size="nothing", vocab_size="nothing")
    elif how == "type":
        change(config, hidden_size="16", jpeglm={"codec": 5})
    elif how == "our type":
        change(config, rms_norm_eps="small", jpeglm={"codec": {"size": 0.5}})
    elif how == "no json":
        config.write_text("{")


@pytest.mark.parametrize(
    "how, form, message",
    [
        ("shard", FORMS[3], "00002-of-00004.safetensors is missing, which model.safetensors.index.json names.*tensors miss"),
        ("shard", FORMS[1], "pytorch_model-00002-of-00004.bin is missing"),
        ("truncated", FORMS[2], "model.safetensors is damaged"),
        ("truncated bin", FORMS[0], "pytorch_model.bin is damaged"),
        ("malicious", FORMS[0], "pytorch_model.bin holds other things than tensors, which were not run"),
        ("malicious, no zip", FORMS[0], "pytorch_model.bin (holds other things than tensors|is damaged)"),
        ("numbers", FORMS[0], "pytorch_model.bin holds no tensors by name"),
        ("tokenizer", FORMS[2], "config.json has a vocabulary of 320, tokenizer.model of 259"),
        ("no tokenizer", FORMS[2], "there is no tokenizer.model"),
        ("no weights", FORMS[2], "there is no model.safetensors and no pytorch_model.bin"),
        ("no config", FORMS[2], "there is no config.json"),
        ("no json", FORMS[2], "config.json is no JSON"),
        (
            "tensors",
            FORMS[2],
            "1 tensor missing: lm_head.weight; 1 tensor of no use here: model.layers.0.self_attn.q_proj.bias; 1 tensor of "
            r"another shape: model.norm.weight \(17,\), not \(16,\); 1 tensor of a dtype .*up_proj.weight F8_E4M3",
        ),
        ("everything", FORMS[2], "tokenizer.model of 259; 1 tensor missing"),
        ("architecture", FORMS[2], "architectures is .'MistralForCausalLM'.*model_type is 'mistral'.*sliding_window 4096"),
        ("fields", FORMS[2], "hidden_act is 'gelu', supported is 'silu'; attention_bias is True.*eos_token_id.*quantization"),
        ("rope", FORMS[2], "rope_parameters.rope_type is 'llama3', supported is 'default'; rope_parameters.factor 8.0 is not"),
        ("old rope", FORMS[2], "rope_scaling is .*, supported is None"),
        ("incomplete", FORMS[2], "vocab_size must be an integer, not None; hidden_size must be an integer, not None"),
        ("type", FORMS[2], "hidden_size must be an integer, not '16'; jpeglm must be an object of objects"),
        ("our type", FORMS[2], "config.json: codec.size must be int, not 0.5; model.norm_eps must be float, not 'small'"),
    ],
)
def test_what_cannot_be_imported_is_one_line_and_leaves_nothing(how, form, message, bpe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage(save(llama(), tmp_path / "hf", form, bpe), how)
    assert re.search(message, error := fails("import", "hf", "run")), error
    assert error.startswith("hf cannot be imported: ")
    assert not (tmp_path / "run").exists() and not (tmp_path / "executed").exists()


def test_a_disk_that_fills_up_leaves_no_run(bpe, tmp_path, monkeypatch):
    source = save(llama(), tmp_path / "hf", vocabulary=bpe)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf._Safetensors, "read", full)
    assert "No space left on device" in fails("import", source, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert "run exists; choose another directory" in fails("import", source, tmp_path / "run")
    assert (tmp_path / "run" / "notes.txt").exists()


def test_an_export_that_stops_half_way_is_loaded_by_nothing(ours, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "FILE_BYTES", 8_000)
    write, written = hf._write_weights, []

    def stops(path, *rest):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(hf, "_write_weights", stops)
    out = tmp_path / "out"
    assert "No space left on device" in fails("export", ours[0], out)
    assert [path.name for path in out.iterdir()] == ["model-00001-of-00006.safetensors"]
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(out)
    assert "out exists; choose another directory, or empty it" in fails("export", ours[0], out)


def test_what_cannot_be_exported_is_one_line(ours, bpe, tmp_path):
    theirs = llama()
    with torch.no_grad():
        theirs.model.norm.weight[0] = 1e6
    run = imported(save(theirs, tmp_path / "hf", vocabulary=bpe), tmp_path / "run")
    beyond = fails("export", run, tmp_path / "out", "--dtype", "float16")
    assert "model.norm.weight has values that float16 does not hold: export it as bfloat16 or float32" in beyond
    assert "nowhere is no run" in fails("export", "nowhere", tmp_path / "other")
    assert "checkpoints/9" in fails("export", f"{run}/checkpoints/9", tmp_path / "other")
    config = runs.read(run)
    model = dataclasses.replace(config.model, qk_norm=True)
    (run / "config.json").write_text(configs.to_json(dataclasses.replace(config, model=model)))
    assert "model.qk_norm has no counterpart" in fails("export", run, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_codec_is_read_from_the_source_or_assumed_and_said(ours, bpe, tmp_path, capsys):
    cli.main(["import", str(save(llama(), tmp_path / "hf", vocabulary=bpe)), str(tmp_path / "published")])
    assert "JPEG 256x256, quality 25, 4:2:0, 256 MCUs of 16x16, a restart marker after each (assumed)" in capsys.readouterr()[0]
    folder = exported(ours[0], tmp_path / "export")
    cli.main(["import", str(folder), str(tmp_path / "ours")])
    printed = capsys.readouterr().out
    assert "JPEG 32x32, quality 25" in printed and "assumed" not in printed
    message = fails("import", folder, tmp_path / "other", "--codec.size", "64")
    assert "its codec stands in config.json: leave the --codec flags out" in message


def test_a_name_that_is_no_directory_is_looked_for_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(name):
        raise ConnectionError("no network\nmore about it")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    message = fails("import", "someone/something", tmp_path / "run")
    assert message == "someone/something is no directory, and not to be had from the Hugging Face hub: no network"

    folder, asked = save(llama(), tmp_path / "hf", "pytorch_model.bin"), {}
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: [path.name for path in folder.iterdir()])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options) or str(folder))
    assert "vocabulary of 320, tokenizer.model of 259" in fails("import", "someone/something", tmp_path / "run")
    assert "pytorch_model*.bin" in asked["allow_patterns"] and "*.safetensors" not in asked["allow_patterns"]


def test_without_the_hub_the_command_says_so_in_one_line(tmp_path):
    # A process of its own: here, transformers has loaded all of the hub's library.
    program = "import sys; from jpeglm_jax.cli import main; main(['import', 'someone/something', sys.argv[1]])"
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("jpeglm: error: someone/something is no directory, and not to be had from the Hugging Face hub")
    assert done.stderr.count("\n") == 1
