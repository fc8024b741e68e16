"""Engines that are there already decode with msn_ext by ``custom_generate/`` alone: transformers'
server, its pipeline, lm-evaluation-harness, and ``model.generate`` itself.
"""

import functools
import json
import re
import socket

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from helpers.commands import CONTEXT, save
from helpers.conversations import repeating_llama
from msn_ext import cli, generation

PROMPTS = ["hello", "Tell me of trees.", "0123456789"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """A model's folder without and with custom_generate/."""
    plain, ours = (str(tmp_path_factory.mktemp(name)) for name in ("plain", "ours"))
    for folder in (plain, ours):
        save(folder, repeating_llama(4 * CONTEXT).double())
    assert cli.main(["export-generate", ours]) == 0
    return plain, ours


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """By call of our decoder, the passes that it took."""
    counted, decode = [], generation.decode

    def counting(request):
        decoded = decode(request)
        counted.append(len(decoded.counts))
        return decoded

    monkeypatch.setattr(generation, "decode", counting)
    return counted


def load(folder: str, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def test_a_model_with_the_folder_decodes_by_it(folders, passes):
    """Also by its old ways to call: inputs, a config, stop strings, a streamer."""
    model, tokenizer = load(folders[0])
    ours, _ = load(folders[1], trust_remote_code=True)
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        want = model.generate(**inputs, max_new_tokens=60, do_sample=False)
        assert torch.equal(ours.generate(**inputs, max_new_tokens=60, do_sample=False), want)
        mask = inputs["attention_mask"]
        by_name = ours.generate(inputs=inputs["input_ids"], attention_mask=mask, max_new_tokens=60)
        assert torch.equal(by_name, want)
        stop = tokenizer.decode(want[0, -20:-18])
        options = dict(max_new_tokens=60, stop_strings=[stop], tokenizer=tokenizer)
        assert torch.equal(ours.generate(**inputs, **options), model.generate(**inputs, **options))
    assert len(passes) == 9 and min(passes) < 50


def test_any_model_can_be_decoded_by_the_folder(folders, passes):
    model, tokenizer = load(folders[0])
    inputs = tokenizer("hello", return_tensors="pt")
    want = model.generate(**inputs, max_new_tokens=40)
    got = model.generate(
        **inputs, max_new_tokens=40, custom_generate=folders[1], trust_remote_code=True
    )
    assert torch.equal(got, want) and len(passes) == 1


def test_a_pipeline_decodes_by_it(folders, passes):
    text = {}
    for folder in folders:
        model, tokenizer = load(folder, trust_remote_code=folder == folders[1])
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        options = dict(max_new_tokens=30, do_sample=False)
        text[folder] = generator(PROMPTS, **options)
    assert text[folders[0]] == text[folders[1]] and len(passes) == len(PROMPTS)


def test_a_folder_with_another_decoder_is_left_alone(tmp_path, capsys):
    there = tmp_path / "custom_generate" / "generate.py"
    there.parent.mkdir()
    there.write_text("def generate(): ...")
    assert cli.main(["export-generate", str(tmp_path)]) == 1
    assert "generate.py: there is another one" in capsys.readouterr().err
    assert there.read_text() == "def generate(): ..."
    (tmp_path / "a file").write_text("")
    assert cli.main(["export-generate", str(tmp_path / "a file")]) == 1


@pytest.fixture(scope="module")
def server(folders):
    """transformers' server with our folder, and a client of it."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    openai = pytest.importorskip("openai")
    from transformers.cli.serve import Serve

    with socket.socket() as some:
        some.bind(("localhost", 0))
        port = some.getsockname()[1]
    served = Serve(
        force_model=folders[1],
        dtype="float64",
        device="cpu",
        trust_remote_code=True,
        port=port,
        non_blocking=True,
    )
    try:
        yield openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=9)
    finally:
        served.kill_server()


def test_a_server_answers_with_the_text_of_plain_decoding(folders, server, passes):
    """Chat, streamed and whole, with a stop string, and sampled from a seed."""
    model, tokenizer = load(folders[0])
    ask, stops = dict(model=folders[1], max_tokens=40), 0
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        begin = inputs["input_ids"].shape[1]
        ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, begin:]
        want = tokenizer.decode(ids, skip_special_tokens=True)
        chat = server.chat.completions
        whole = chat.create(messages=messages, temperature=0, **ask)
        assert whole.choices[0].message.content == want
        parts = chat.create(messages=messages, temperature=0, stream=True, **ask)
        assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == want
        if stop := re.search("[^\ufffd]", want[5:-5]):  # a letter of whole bytes
            stops += 1
            short = chat.create(messages=messages, temperature=0, stop=stop.group(), **ask)
            assert short.choices[0].message.content == want[: want.index(stop.group()) + 1]
        sampled = dict(generation_config=GenerationConfig(do_sample=True).to_json_string())
        drawn = [
            chat.create(messages=messages, seed=3, extra_body=sampled, **ask) for _ in range(2)
        ]
        texts = [answer.choices[0].message.content for answer in drawn]
        assert texts[0] == texts[1] != want
    assert stops and len(passes) == 4 * len(PROMPTS) + stops and min(passes) < 30


@pytest.mark.parametrize("batch", [1, 2])
def test_the_evaluation_harness_scores_the_same(folders, tmp_path, passes, batch):
    """Its stop strings are criteria that end a batch together."""
    evaluation = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    data = tmp_path / "data.jsonl"
    lines = [json.dumps(dict(question=prompt, answer="v")) for prompt in PROMPTS]
    data.write_text("\n".join(lines))
    (tmp_path / "task.yaml").write_text(
        json.dumps(
            dict(
                task="ours",
                dataset_path="json",
                dataset_kwargs=dict(data_files=dict(test=str(data))),
                test_split="test",
                output_type="generate_until",
                doc_to_text="{{question}}",
                doc_to_target="{{answer}}",
                generation_kwargs=dict(until=["vv", "@"], max_gen_toks=40, do_sample=False),
                metric_list=[dict(metric="exact_match")],
            )
        )
    )
    texts = []
    for folder in folders:
        arguments = dict(pretrained=folder, dtype="float64", trust_remote_code=folder == folders[1])
        found = evaluation.simple_evaluate(
            model="hf",
            model_args=arguments,
            tasks=["ours"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            device="cpu",
            batch_size=batch,
            bootstrap_iters=0,
        )
        texts.append([sample["resps"] for sample in found["samples"]["ours"]])
    assert texts[0] == texts[1] and len(passes) == -(-len(PROMPTS) // batch)


def test_generate_in_the_place_of_the_models_own(folders, passes):
    """As users put it there by hand; both ways to name the model."""
    model, tokenizer = load(folders[0])
    inputs = tokenizer("hello", return_tensors="pt")
    want = model.generate(**inputs, max_new_tokens=30)
    for put in (functools.partial(generation.generate, model), generation_by_name(model)):
        model.generate = put
        assert torch.equal(model.generate(**inputs, max_new_tokens=30), want)
    assert len(passes) == 2


def generation_by_name(model):
    return functools.partial(generation.generate, model=model)
