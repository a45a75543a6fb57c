"""How factories become known, and how those that cannot are refused."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import decoder
import pytest
from support.command_line import polyshard
from support.models import broken_factories

import polyshard as ps
from polyshard.checkpoint.save import model_documents
from polyshard.registry import ENVIRONMENT_VARIABLE, reference_of, resolve


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def test_registering_puts_the_factory_where_child_processes_find_it():
    ps.register_model("MyDecoder", decoder.build_model)
    ps.register_model("MyDecoder", decoder.build_model)
    ps.register_model("Other", "decoder:build_model", adapter="torch")
    assert json.loads(os.environ[ENVIRONMENT_VARIABLE]) == {
        "MyDecoder": {"factory": "decoder:build_model", "adapter": "vllm"},
        "Other": {"factory": "decoder:build_model", "adapter": "torch"},
    }
    code = "import polyshard as ps; print(sorted(ps.registered_models()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['MyDecoder', 'Other']"


def test_the_short_form_of_the_environment_variable(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, '{"Short": "decoder:build_model"}')
    assert ps.registered_models()["Short"].adapter == "vllm"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"A": 3}', '{"A": {"adapter": "torch"}}', '{"A": {"factory": "m:f", "x": 1}}']
)
def test_a_malformed_environment_variable_is_refused(monkeypatch, text):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, text)
    with pytest.raises(ps.RegistrationError, match=f"{ENVIRONMENT_VARIABLE}.*expected"):
        ps.registered_models()


class Factory:
    __module__ = None

    def __call__(self, config, parallel_context):
        return None


def local_function_factory():
    def factory(config, parallel_context):
        return None

    return factory


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            lambda config, context: None,
            "cannot be found by name in a worker. .*Define the factory at the top level",
        ),
        (local_function_factory(), "cannot be found by name in a worker"),
        (Factory(), "has no module and name by which a worker could find it"),
        ("decoder", "is invalid: expected 'module:attribute'"),
        ("nowhere.to.be.found:f", "importing 'nowhere.to.be.found' raised ModuleNotFoundError"),
        ("decoder:nothing", "'decoder' has no 'nothing'"),
        ("/nowhere/file.py:f", "does not exist"),
        ("support.models.broken_factories:not_callable", "is a int, expected a function"),
    ],
)
def test_what_a_worker_could_not_find_is_refused_before_an_engine_starts(factory, message):
    with pytest.raises(ps.RegistrationError, match=message):
        ps.register_model("Refused", factory)
    assert ENVIRONMENT_VARIABLE not in os.environ


def test_bad_names_and_adapters():
    with pytest.raises(ps.RegistrationError, match="expected an identifier"):
        ps.register_model("my model", decoder.build_model)
    with pytest.raises(ps.AdapterError, match="unknown adapter 'jax'; available: .*torch, vllm"):
        ps.register_model("My", decoder.build_model, adapter="jax")


def test_a_factory_in_a_file_is_found_by_its_path(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def build(config, parallel_context):\n    return None\n")
    ps.register_model("FromFile", f"{path}:build")
    assert resolve(ps.registered_models()["FromFile"].reference)(None, None) is None


def test_a_factory_typed_at_a_prompt_is_refused():
    code = "import polyshard as ps\ndef f(c, p): ...\nps.register_model('A', f)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "RegistrationError: __main__:f was defined at a prompt" in done.stderr


def test_a_function_knows_its_reference():
    assert reference_of(broken_factories.raises) == "support.models.broken_factories:raises"


def test_serving_a_checkpoint_without_a_registered_model_says_so(tmp_path, capfd):
    pytest.importorskip("vllm", reason="needs vLLM")
    from support.models.tiny import save_tiny

    directory = save_tiny(tmp_path / "model", "llama")
    done = polyshard(capfd, "serve", directory)
    assert done.returncode == 2
    assert "no model is registered for" in done.stderr
    assert "Pass --factory" in done.stderr
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"polyshard": {"factory": "decoder:build_model"}}))
    assert "pass --trust-checkpoint to run it" in polyshard(capfd, "serve", directory).stderr
    assert "has no 'nothing'" in polyshard(capfd, "serve", directory, "--factory", "decoder:nothing").stderr
    assert "config.json does not exist" in polyshard(capfd, "serve", tmp_path / "nowhere").stderr
    assert "--outputs only apply to a model" in polyshard(capfd, "serve", directory, "--outputs", "logits").stderr


@pytest.mark.vllm
def test_a_checkpoint_records_how_its_model_is_registered(tmp_path, monkeypatch):
    """... and the command line goes before it."""
    from polyshard.cli.serve import SERVED_NAME, server_command

    monkeypatch.delenv("POLYSHARD_MODELS", raising=False)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    registered = ps.register_model(
        "Recorded",
        functools.partial(decoder.build_model, sliding=3),
        adapter="torch",
        outputs="logits",
        names={"^a": "b"},
    )
    fields = model_documents({"vocab_size": 5}, "Recorded", registered, {})["config.json"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    monkeypatch.delenv("POLYSHARD_MODELS")
    with pytest.raises(ps.RegistrationError, match="names the factory 'decoder:build_model': pass --trust-checkpoint"):
        server_command(tmp_path, None, False, [])
    command = server_command(tmp_path, None, True, ["--port", "1"], names='{"^c": "d"}')
    assert command[-2:] == ["--port", "1"]
    assert ps.registered_models()[SERVED_NAME] == dataclasses.replace(registered, name=SERVED_NAME, names={"^c": "d"})
    fields["polyshard"]["stray"] = 1
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ps.RegistrationError, match=r"config.json: polyshard is invalid: got .*stray.* expected"):
        server_command(tmp_path, None, True, [])


@pytest.mark.parametrize("option", ['"inputs": "rows"', '"outputs": "tokens"', '"arguments": [1]', '"names": 3'])
def test_a_malformed_option_in_the_environment_is_refused(monkeypatch, option):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, f'{{"A": {{"factory": "decoder:build_model", {option}}}}}')
    with pytest.raises(ps.RegistrationError, match=f"{ENVIRONMENT_VARIABLE}: 'A': "):
        ps.registered_models()


def test_a_checkpoint_without_a_tokenizer_is_served_by_token_ids(tmp_path):
    pytest.importorskip("vllm", reason="needs vLLM")
    from support.models.tiny import save_tiny

    from polyshard.cli.serve import server_command

    directory = save_tiny(tmp_path / "model", "llama")

    def skips(*arguments):
        command = server_command(directory, "decoder:build_model", False, list(arguments))
        return command.count("--skip-tokenizer-init")

    assert skips() == 1
    assert skips("--port", "8001") == 1
    assert skips("--skip-tokenizer-init") == 1, "what the user says is not said twice"
    assert skips("--tokenizer", "elsewhere") == skips("--tokenizer=elsewhere") == 0
    for name in ("tokenizer.json", "vocab.txt", "spiece.model", "qwen.tiktoken", "tekken.json"):
        (directory / name).touch()
        assert skips() == 0, name
        (directory / name).unlink()
