"""OpenAI's own client gets what the engine gives."""

import concurrent.futures
import json

import httpx
import numpy as np
import openai
import pytest

from tests.rollout.small_world import ID, make_model, text_of
from tests.serve.small_server import CONFIG, SAMPLING, make_engine, make_tokenizer, serving
from tw_jax.rollout.live_text import finished_text
from tw_jax.rollout.request import Request, sampling_seed

PROMPT = "ab"
SEEDS = range(16)


def requested(seed, mode="parallel", **sampling):
    prompt = np.array([ID["<bos>"], ID["a"], ID["b"]], np.int32)
    return Request(prompt, seed, SAMPLING.__class__(**{**vars(SAMPLING), **sampling}), mode)


@pytest.fixture(scope="module")
def expected():
    """What the engine gives in this process: by seed, and some more by name."""
    asked = {seed: requested(seed) for seed in SEEDS}
    asked["greedy"] = requested(3, temperature=0.0)
    asked["sequential"] = requested(4, "sequential")
    asked["second"] = requested(sampling_seed(5, 1))
    rollouts = make_engine().generate(make_model()[1], list(asked.values()))
    return dict(zip(asked, rollouts, strict=True))


@pytest.fixture(scope="module")
def server(expected):
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def ids(rollout):
    return rollout.response.tolist()


def text(rollout):
    return text_of(rollout.response).removesuffix("<eos>")


def complete(client, seed=1, prompt=PROMPT, ids=True, stream=False, **fields):
    names = ("n", "stop", "logprobs", "temperature", "top_p", "max_tokens", "stream_options")
    plain = {name: fields.pop(name) for name in names if name in fields}
    extra = {"return_token_ids": ids, **fields}
    return client.completions.create(
        model="small", prompt=prompt, seed=seed, stream=stream, extra_body=extra, **plain
    )


def test_the_model_thinks_in_parallel(expected):
    """Else the tests below would test little."""
    assert sum(len(expected[seed].trajectory.blocks) for seed in SEEDS) >= 8


def test_a_completion_is_the_rollout(client, expected):
    for seed in list(SEEDS)[:6]:
        answer = complete(client, seed)
        rollout, choice = expected[seed], answer.choices[0]
        assert choice.token_ids == ids(rollout)
        assert choice.text == text(rollout)
        assert choice.prompt_token_ids == rollout.prompt.tolist()
        assert choice.finish_reason == ("stop" if rollout.finish_reason == "eos" else "length")
        assert choice.rollout["critical_path"] == rollout.critical_path
        assert choice.rollout["blocks"] == len(rollout.trajectory.blocks)
        assert answer.usage.prompt_tokens == 3
        assert answer.usage.completion_tokens == rollout.total_tokens == len(choice.token_ids)
        assert answer.usage.total_tokens == 3 + rollout.total_tokens


def test_parallel_clients_get_their_own_rollouts(client, expected):
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda seed: complete(client, seed), SEEDS))
    assert [a.choices[0].token_ids for a in answers] == [ids(expected[seed]) for seed in SEEDS]


def test_greedy_sequential_and_prompts_as_ids(client, expected):
    prompt = expected[1].prompt.tolist()
    greedy = complete(client, 3, prompt=prompt, temperature=0.0)
    assert greedy.choices[0].token_ids == ids(expected["greedy"])
    plain = complete(client, 4, prompt=[prompt], parallel_thinking=False)
    assert plain.choices[0].token_ids == ids(expected["sequential"])


def test_several_prompts_and_choices(client, expected):
    answer = complete(client, 5, prompt=["ab", "ab"], n=2)
    want = [ids(expected[5]), ids(expected["second"])] * 2
    assert [choice.token_ids for choice in answer.choices] == want
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.completion_tokens == sum(map(len, want))


def test_seeds(client):
    one, two = (complete(client, None, n=2, ids=True).choices for _ in range(2))
    assert [c.token_ids for c in one] != [c.token_ids for c in two]


def test_logprobs_are_the_engines(client, expected):
    for seed in list(SEEDS)[:4]:
        want = finished_text(expected[seed])
        got = complete(client, seed, logprobs=0).choices[0].logprobs
        assert_close(got.token_logprobs, want.logprobs[3:])
        assert "".join(got.tokens).removesuffix("<eos>") == text(expected[seed])
        assert got.text_offset == [len("".join(got.tokens[:i])) for i in range(len(got.tokens))]


def assert_close(got, want):
    """What else is in the batch moves log-probabilities by roundings."""
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def chat(client, seed, **fields):
    messages = [{"role": "user", "content": PROMPT}]
    extra = fields.pop("extra_body", {})
    return client.chat.completions.create(
        model="small", messages=messages, seed=seed, extra_body=extra, **fields
    )


def test_a_chat_is_the_rollout_of_its_prompt(client, expected):
    answer = chat(client, 2, logprobs=True, extra_body={"return_token_ids": True})
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == text(expected[2])
    assert choice.token_ids == ids(expected[2])
    want = finished_text(expected[2]).logprobs[3:]
    assert_close([t.logprob for t in choice.logprobs.content], want)
    short = chat(client, 2, max_completion_tokens=4, max_tokens=9)
    assert short.usage.completion_tokens == 4 and short.choices[0].finish_reason == "length"


def streamed(chunks):
    """Texts, ids, log-probabilities, thread events and ends of a stream, by choice."""
    found, usage = {}, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            one = found.setdefault(
                choice.index, {"text": "", "ids": [], "lp": [], "threads": [], "end": []}
            )
            is_chat = hasattr(choice, "delta")
            one["text"] += (choice.delta.content or "") if is_chat else choice.text
            one["ids"] += getattr(choice, "token_ids", None) or []
            if choice.logprobs is not None:
                got = choice.logprobs
                one["lp"] += [t.logprob for t in got.content] if is_chat else got.token_logprobs
            one["threads"] += getattr(choice, "thread_events", None) or []
            one["end"] += [choice.finish_reason] if choice.finish_reason else []
    return found, usage


def threads_of(events):
    """Text, ids and number of each thread out of its events."""
    found, ended = {}, set()
    for news in events:
        key = news["block"], news["thread"]
        assert key not in ended, "a thread went on after its end"
        one = found.setdefault(key, {"number": news["number"], "text": "", "ids": []})
        one["text"] += news["delta"]
        one["ids"] += news["token_ids"]
        if news["ended"]:
            ended.add(key)
    assert ended == set(found)
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_streams_equal_whole_answers_and_show_every_thread(client, expected, seed):
    rollout = expected[seed]
    usage = {"include_usage": True}
    found, usage = streamed(complete(client, seed, stream=True, logprobs=0, stream_options=usage))
    one = found[0]
    assert (one["text"], one["ids"]) == (text(rollout), ids(rollout))
    assert_close(one["lp"], finished_text(rollout).logprobs[3:])
    assert one["end"] == ["stop" if rollout.finish_reason == "eos" else "length"]
    assert usage.completion_tokens == rollout.total_tokens
    got = threads_of(one["threads"])
    stops = (ID["</Thread>"], ID["<eos>"])
    for unit in rollout.units:
        if unit.kind != "thread":
            continue
        thread = got[unit.block, unit.thread]
        span = rollout.trajectory.blocks[unit.block].threads[unit.thread - 1]
        assert thread["number"] == span.number
        n = len(unit.completion)
        if unit.finish_reason not in ("length", "context"):  # those may be cut when they join
            assert len(thread["ids"]) == n
            assert thread["text"] == text_of(t for t in unit.completion if t not in stops)
        assert thread["ids"][:n] == unit.completion.tolist()


def test_a_chat_streams_with_several_choices(client, expected):
    extra = {"return_token_ids": True}
    found, usage = streamed(chat(client, 5, stream=True, n=2, extra_body=extra))
    assert usage is None
    assert [found[i]["text"] for i in (0, 1)] == [text(expected[5]), text(expected["second"])]


def stop_in(rollout):
    """A stop string of several tokens that the text holds, its place, and the tokens up to it."""
    whole = text(rollout)
    at = len(whole) // 2
    stop = whole[at : at + 4]
    at = whole.index(stop)
    pieces = [text_of([t]) for t in ids(rollout)]
    count = next(n for n in range(1, 99) if len("".join(pieces[:n])) >= at + len(stop))
    return stop, whole[:at], count


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_stop_strings(client, expected, seed):
    stop, want, count = stop_in(expected[seed])
    answer = complete(client, seed, stop=["not there", stop])
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == (want, "stop")
    assert answer.usage.completion_tokens == count
    assert choice.token_ids == ids(expected[seed])[:count]
    assert choice.rollout is None
    found, _ = streamed(complete(client, seed, stop=stop, stream=True))
    assert (found[0]["text"], found[0]["end"]) == (want, ["stop"])


def test_models_and_health(client, server):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "tw_jax"
    assert client.models.retrieve("small").max_model_len == CONFIG.engine.context_len
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("large")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/openapi.json").status_code == 200


def test_a_stream_is_server_sent_events(server):
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={"prompt": "a", "stream": True}, timeout=60
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert "token_ids" not in chunks[0]["choices"][0]


def test_metrics_count(client, server):
    names = ("tw_jax_completion_tokens_total", "tw_jax_prompt_tokens_total")
    completed = 'tw_jax_requests_total{endpoint="/v1/completions",outcome="completed"}'
    first = "tw_jax_time_to_first_token_seconds_count"
    names = (*names, completed, first)
    before = [server.metric(name) for name in names]
    answer = complete(client, 1)
    list(complete(client, 1, stream=True))
    after = [server.metric(name) for name in names]
    gained = [b - a for a, b in zip(before, after, strict=True)]
    assert gained == [2 * answer.usage.completion_tokens, 6, 2, 1]
    assert server.metric("tw_jax_running") == server.metric("tw_jax_queue_length") == 0


def test_decoding_compiled_nothing_more(server):
    engine = make_engine()
    for program in (engine.advance, engine.admit, engine.harvest, engine.interrupt):
        assert program._cache_size() == 1
    assert make_tokenizer().decode([ID["a"]]) == "a" and CONFIG.sampling == SAMPLING
