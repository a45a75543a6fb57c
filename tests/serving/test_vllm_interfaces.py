"""Every form of factory and of model that an engine can be given; the oracle is transformers."""

import dataclasses
import functools
import os
import pickle

import decoder
import pytest
from support.engines import engine, greedy
from support.models import plain
from support.models.tiny import save_tiny
from support.oracles.greedy import assert_same_generation, greedy_transformers

import polyshard as ps

pytestmark = pytest.mark.vllm

PROMPTS = [[1, 2, 3, 4, 5], [7, 9, 11], list(range(40))]
TOKENS, BOUND = 6, 2e-5
BARE = {"inputs": "batched", "outputs": "logits"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = save_tiny(tmp_path_factory.mktemp("forms") / "model", "llama", hidden_size=96, head_dim=32)
    return directory, greedy_transformers(directory, PROMPTS, TOKENS)


@pytest.mark.parametrize(
    ("adapter", "names"),
    [("vllm", {"^": "network."}), ("torch", plain.under_network), ("vllm", "support.models.plain:under_network")],
)
def test_a_partial_of_a_class_that_takes_batches_gives_logits_and_has_its_own_names(served, names, adapter):
    directory, expected = served
    factory = functools.partial(plain.Plain, temperature=1.0)
    ps.register_model("ServedPlain", factory, adapter=adapter, names=names, **BARE)
    with engine(directory, "ServedPlain") as llm:
        assert_same_generation(greedy(llm, PROMPTS, TOKENS), expected, BOUND)


def test_a_closure_serves_engines_of_this_process(served):
    directory, expected = served
    built = []

    def factory(config, parallel_context):
        built.append(decoder.build_model(config, parallel_context))
        return built[-1]

    ps.register_model("ServedClosure", factory, this_process=True)
    with engine(directory, "ServedClosure") as llm:
        assert_same_generation(greedy(llm, PROMPTS, TOKENS), expected, BOUND)
    assert len(built) == 1


def test_a_closure_is_refused_where_workers_would_be_started(monkeypatch):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    with pytest.raises(ps.RegistrationError, match=r"another process.*set VLLM_ENABLE_V1_MULTIPROCESSING=0"):
        ps.register_model("Refused", lambda config, context: None, this_process=True)


def test_a_worker_that_lacks_the_closure_says_so(monkeypatch):
    monkeypatch.setenv("POLYSHARD_MODELS", '{"Elsewhere": {"factory": "<process>:Elsewhere"}}')
    from polyshard.adapters.vllm.plugin import register

    with pytest.raises(ps.RegistrationError, match=r"'Elsewhere' was registered with this_process=True in another"):
        register()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": "rows"}, "inputs is invalid: got 'rows', expected 'packed' or 'batched'"),
        ({"outputs": "tokens"}, "outputs is invalid: got 'tokens', expected 'hidden' or 'logits'"),
        ({"names": {"(": "x"}}, r"'\(' -> 'x' is not a regular expression"),
        ({"names": {"a": r"\1"}}, "is not a regular expression"),
        ({"names": "support.models.plain:nothing"}, "has no 'nothing'"),
        ({"names": lambda name: name}, "cannot be found by name in a worker"),
    ],
)
def test_bad_options_are_refused(options, message):
    before = os.environ.get("POLYSHARD_MODELS")
    with pytest.raises(ps.RegistrationError, match=message):
        ps.register_model("Refused", decoder.build_model, **options)
    assert os.environ.get("POLYSHARD_MODELS") == before


@pytest.mark.parametrize(
    "factory", [functools.partial(plain.Plain, temperature=object()), functools.partial(plain.Plain, 3)]
)
def test_a_partial_that_cannot_travel_is_refused(factory):
    with pytest.raises(ps.RegistrationError, match="can only be sent to a worker with keyword arguments of plain JSON"):
        ps.register_model("Refused", factory)


def test_what_a_model_lacks_is_named_with_the_way_to_add_it(served):
    ps.register_model("Lacks", functools.partial(plain.Plain, temperature=1.0), names={"^": "network."})
    with (
        pytest.raises(Exception, match=r"(?s)missing a method compute_logits.*def compute_logits.*outputs=\"logits\""),
        engine(served[0], "Lacks"),
    ):
        pass


def test_an_output_of_another_shape_is_refused(served):
    ps.register_model(
        "TooMuch", functools.partial(plain.GivesTooMuch, temperature=1.0), names={"^": "network."}, **BARE
    )
    with (
        engine(served[0], "TooMuch") as llm,
        pytest.raises(Exception, match=r"forward gave \(1, 6, \d+\), expected logits"),
    ):
        greedy(llm, [[1, 2, 3]], 1)


@pytest.mark.parametrize("model_type", [None, "made_up"])
def test_a_config_that_transformers_does_not_know(served, tmp_path, model_type):
    directory, expected = served
    own = plain.OwnConfig(131, 96, 2, 4, 2, 256, 80, 32)
    context = ps.initialize("torch")
    model = plain.build_own(own, context)
    ps.load_checkpoint(model, directory, context)
    config = own if model_type is None else {**dataclasses.asdict(own), "model_type": model_type}
    ps.save_checkpoint(model, tmp_path / "own", context, config=config, architecture="ServedOwn")
    ps.register_model("ServedOwn", plain.build_own, config_type=plain.OwnConfig, model_type=model_type)
    with engine(tmp_path / "own") as llm:
        assert_same_generation(greedy(llm, PROMPTS, TOKENS), expected, BOUND)
        config = llm.llm_engine.vllm_config.model_config.hf_config
    assert type(pickle.loads(pickle.dumps(config))) is type(config)


def test_what_a_config_lacks_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "polyshard", "n_embd": 32, "vocab_size": 9}')
    ps.register_model("ServedOwn", plain.build_own, config_type=plain.OwnConfig)
    with pytest.raises(Exception, match=r"vLLM needs num_hidden_layers \(or n_layer, n_layers"), engine(tmp_path):
        pass


def test_a_model_type_of_transformers_own_is_refused():
    with pytest.raises(ps.RegistrationError, match=r"'llama' is already defined by transformers \(LlamaConfig\)"):
        ps.register_model("NeverServed", plain.build_own, model_type="llama")
    assert "NeverServed" not in ps.registered_models()


def test_a_config_type_that_is_no_dataclass_is_refused():
    with pytest.raises(ps.RegistrationError, match="config_type is invalid: got .*, expected a dataclass"):
        ps.register_model("ServedOwn", plain.build_own, config_type=plain.Plain)
