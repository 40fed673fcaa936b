"""Hugging Face transformers, the real package: pipelines, and `generate` step by step."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import CompileConfig, GenerationConfig, GPT2LMHeadModel, TextIteratorStreamer, pipeline  # noqa: E402
from transformers.generation import (  # noqa: E402
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_utils import PreTrainedModel  # noqa: E402
from transformers.pipelines.base import Pipeline  # noqa: E402
from transformers.pipelines.text_classification import TextClassificationPipeline  # noqa: E402

import gpuscope  # noqa: E402
from gpuscope._data.metrics import (  # noqa: E402
    OF_GENERATIONS,
    REQUEST_DURATION,
    TIME_PER_OUTPUT_TOKEN,
    TIME_TO_FIRST_TOKEN,
)
from gpuscope._recording.state import state  # noqa: E402

from .models_recorded import attributes, paths, recorded, without_compilations  # noqa: E402
from .models_transformers import PROMPT, bert, gpt2, t5, tokenizer, whisper  # noqa: E402

GREEDY = {"max_new_tokens": 4, "do_sample": False}
CLASSIFY = ["pipeline", "pipeline/preprocess", "pipeline/forward", "pipeline/postprocess"]


class TestPipeline:
    """Pipelines, with tokenizers and models made here."""

    def test_has_its_three_stages(self):
        """A pipeline's call is a stage with `preprocess`, `forward` and `postprocess` in it, and answers the same."""
        classify = pipeline("text-classification", model=bert(), tokenizer=tokenizer(), device="cpu")
        plain = classify("the cat sat")
        with recorded("transformers") as spans:
            assert classify("the cat sat") == plain
        assert paths(spans) == CLASSIFY
        assert attributes(spans, "preprocess") == [{"task": "text-classification"}]
        assert attributes(spans, "forward") == [
            {
                "task": "text-classification",
                "model": "BertForSequenceClassification",
                "batch_size": 1,
                "input_length": 3,
            }
        ]

    def test_a_batch_is_one_forward(self):
        """A list is one call: each input has its `preprocess` and `postprocess`, each batch one `forward`."""
        classify = pipeline("text-classification", model=bert(), tokenizer=tokenizer(), device="cpu")
        with recorded("transformers") as spans:
            classify(["the cat", "sat on", "a mat", "a cat"], batch_size=2)
        names = [span.name for span in spans]
        assert {name: names.count(name) for name in names} == {
            "pipeline": 1,
            "preprocess": 4,
            "forward": 2,
            "postprocess": 4,
        }
        assert [one["batch_size"] for one in attributes(spans, "forward")] == [2, 2]

    def test_a_preprocess_that_yields_chunks(self):
        """Of a pipeline that cuts its input into chunks, the `preprocess` of each chunk is timed, not its creation."""
        tag = pipeline("token-classification", model=bert(for_tokens=True), tokenizer=tokenizer(), device="cpu")
        plain = tag("the cat")
        with recorded("transformers") as spans:
            assert tag("the cat") == plain
        assert paths(spans) == CLASSIFY
        assert attributes(spans, "preprocess") == [{"task": "token-classification"}]

    def test_generates_within_forward(self):
        """Text generation has its `generate` in `forward`."""
        write = pipeline("text-generation", model=gpt2(), tokenizer=tokenizer(), device="cpu")
        with recorded("transformers") as spans:
            write("the cat sat", **GREEDY)
        inside = [path.removeprefix("pipeline/forward/") for path in paths(spans) if "generate" in path]
        assert inside == ["generate", "generate/prefill", *["generate/decode"] * 3]

    def test_a_subclass_of_the_program(self):
        """A pipeline class made later, whose method calls `super()`, has one `postprocess`, not two."""
        with recorded("transformers") as spans:

            class Loud(TextClassificationPipeline):
                def postprocess(self, model_outputs, **parameters):
                    """Do what the class above does."""
                    return super().postprocess(model_outputs, **parameters)

            Loud(model=bert(), tokenizer=tokenizer(), device="cpu")("the cat")
        assert paths(spans) == CLASSIFY

    def test_an_error_ends_every_stage(self):
        """What fails within passes through, and each stage around it says so."""
        classify = pipeline("text-classification", model=bert(), tokenizer=tokenizer(), device="cpu")
        with recorded("transformers") as spans:
            with pytest.raises(ValueError, match="text input must be"):
                classify(3)
            classify("the cat")
        assert [span.status for span in spans[:2]] == ["ERROR", "ERROR"]
        assert paths(spans)[2:] == CLASSIFY


class TestGenerate:
    """`generate`, called by the program itself."""

    def test_a_prefill_and_a_decode_for_each_other_token(self):
        """The first forward is `prefill`, the others `decode`; sizes are told, and the tokens are the same."""
        model = gpt2()
        plain = model.generate(PROMPT, **GREEDY)
        with recorded("transformers") as spans:
            assert torch.equal(model.generate(PROMPT, **GREEDY), plain)
        assert paths(spans) == ["generate", "generate/prefill", *["generate/decode"] * 3]
        (found,) = attributes(spans, "generate")
        first_s, each_s = (found.pop(f"gen_ai.server.time_{which}") for which in ("to_first_token", "per_output_token"))
        request, first, second, *_ = spans
        assert first.end_ns - request.start_ns <= first_s * 1e9 + 1e6
        assert first_s * 1e9 <= second.start_ns - request.start_ns + 1e6
        assert first_s + 3 * each_s == pytest.approx(request.duration_ns / 1e9, abs=0.05)
        assert [found] == [
            {
                "gen_ai.operation.name": "text_completion",
                "gen_ai.provider.name": "transformers",
                "gen_ai.request.model": "GPT2LMHeadModel",
                "gen_ai.usage.input_tokens": 6,
                "gen_ai.usage.output_tokens": 8,
                "batch_size": 2,
                "input_length": 3,
                "new_tokens": 4,
            }
        ]

    @pytest.mark.parametrize(
        ("options", "steps"),
        [
            ({"num_beams": 2}, ["prefill", "decode", "decode", "decode"]),
            ({"use_cache": False}, ["prefill", "decode", "decode", "decode"]),
            ({"prefill_chunk_size": 2}, ["prefill", "prefill", "decode", "decode", "decode"]),
            ({"return_dict_in_generate": True}, ["prefill", "decode", "decode", "decode"]),
        ],
    )
    def test_ways_to_generate(self, options, steps):
        """Beams, no cache, a prompt in chunks, a result with more in it: the steps are what they are."""
        with recorded("transformers") as spans:
            gpt2().generate(PROMPT, **GREEDY, **options)
        assert [span.name for span in spans] == ["generate", *steps]
        assert attributes(spans, "generate")[0]["new_tokens"] == 4

    @pytest.mark.parametrize(
        ("arguments", "options", "tokens"),
        [
            ([PROMPT], {"num_beams": 2}, (6, 8)),
            ([PROMPT], {"num_beams": 3, "num_return_sequences": 2}, (6, 16)),
            ([PROMPT], {"do_sample": True, "num_return_sequences": 3}, (6, 24)),
            ([], {"input_ids": PROMPT[:1]}, (3, 4)),
            ([], {"inputs": PROMPT[:1]}, (3, 4)),
            ([], {"inputs_embeds": torch.zeros(2, 5, 16)}, (10, 8)),
            ([], {}, (None, 4)),
        ],
    )
    def test_tokens_are_counted_by_shapes(self, arguments, options, tokens):
        """What goes in is counted once per sequence that is given, what comes out for all that are returned."""
        with recorded("transformers") as spans:
            gpt2().generate(*arguments, **{**GREEDY, **options})
        (found,) = attributes(spans, "generate")
        assert (found.get("gen_ai.usage.input_tokens"), found["gen_ai.usage.output_tokens"]) == tokens

    def test_a_generation_is_a_request_of_a_model_server(self):
        """Each has its duration, the time to its first token, and the time per token after it, as the host saw them."""
        with recorded("transformers") as spans:
            gpt2().generate(PROMPT, **GREEDY)
            assert gpuscope.flush()
            points = state.engine.collector.metrics_pipeline.snapshot().points
        request, first = (next(span for span in spans if span.name == name) for name in ("generate", "prefill"))
        sums = {spec: points[spec][0].value.sum_s for spec in OF_GENERATIONS}
        assert sums == {
            REQUEST_DURATION: pytest.approx(request.duration_ns / 1e9),
            TIME_TO_FIRST_TOKEN: pytest.approx(request.attributes[TIME_TO_FIRST_TOKEN.name]),
            TIME_PER_OUTPUT_TOKEN: pytest.approx(request.attributes[TIME_PER_OUTPUT_TOKEN.name]),
        }
        assert sums[TIME_TO_FIRST_TOKEN] >= (first.end_ns - request.start_ns) / 1e9
        assert points[REQUEST_DURATION][0].attributes == {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "transformers",
            "gen_ai.request.model": "GPT2LMHeadModel",
        }

    @pytest.mark.parametrize(
        ("facts", "operation", "tokens"),
        [
            ({"input_modalities": ("image", "text")}, "generate_content", 6),
            ({"output_modalities": ("audio",)}, "generate_content", 6),
            ({"input_modalities": ("text",), "output_modalities": ("text",)}, "text_completion", 6),
            ({"main_input_name": property(lambda self: 1 / 0)}, None, None),
        ],
    )
    def test_more_than_text_is_content(self, facts, operation, tokens):
        """The operation's name follows what the model takes and gives; a model that cannot say has none."""
        model = gpt2()
        kind = type("Other", (type(model),), facts)
        with recorded("transformers") as spans, contextlib.suppress(ZeroDivisionError):
            kind(model.config).eval().generate(PROMPT, **GREEDY)
        (found,) = attributes(spans, "generate")
        assert found.get("gen_ai.operation.name") == operation
        assert found.get("gen_ai.usage.input_tokens") == tokens

    def test_sound_has_no_tokens(self):
        """What is no text is not counted as tokens; each window of a long recording is an operation."""
        audio = torch.zeros(1, 80, 3000)
        with recorded("transformers") as spans:
            whisper().generate(audio, max_new_tokens=4, do_sample=False)
        (found,) = attributes(spans, "generate")
        assert found["gen_ai.operation.name"] == "generate_content"
        assert "gen_ai.usage.input_tokens" not in found
        assert found["gen_ai.usage.output_tokens"] > 0

    def test_an_encoder_is_no_step(self):
        """Of an encoder with a decoder, the steps are the decoder's, and the input's length is the encoder's."""
        with recorded("transformers") as spans:
            t5().generate(PROMPT, **GREEDY)
        assert paths(spans) == ["generate", "generate/prefill", *["generate/decode"] * 3]
        (found,) = attributes(spans, "generate")
        assert (found["input_length"], found["gen_ai.usage.input_tokens"]) == (3, 6)
        assert (found["new_tokens"], found["gen_ai.usage.output_tokens"]) == (4, 8)

    def test_an_assistant_generates_for_itself(self):
        """With an assistant model, its `generate` is within the model's, with steps of its own."""
        with recorded("transformers") as spans:
            gpt2(layers=2).generate(PROMPT[:1], assistant_model=gpt2(), **GREEDY)
        found = paths(spans)
        assert found[0] == "generate"
        assert {"generate/prefill", "generate/generate", "generate/generate/prefill"} <= set(found)
        told = attributes(spans, "generate")
        assert all("gen_ai.request.model" in each for each in told)
        assert ["gen_ai.operation.name" in each for each in told] == [
            path == "generate" for path in found if path.endswith("generate")
        ]
        assert [each.get("gen_ai.usage.output_tokens") for each in told if "gen_ai.operation.name" in each] == [4]
        assert not any("gen_ai.usage.output_tokens" in each for each in told[1:])

    @pytest.mark.skipif(not hasattr(PreTrainedModel, "get_compiled_call"), reason="this version does not compile")
    def test_decodes_that_generate_compiles(self):
        """Where `generate` itself compiles the decoding forward, each is a stage all the same."""
        model = gpt2()
        compiled = CompileConfig(backend="eager", mode=None, fullgraph=True)
        compiled._compile_all_devices = True
        options = {**GREEDY, "cache_implementation": "static", "compile_config": compiled}
        plain = model.generate(PROMPT, **options)
        with recorded("transformers") as spans:
            assert torch.equal(model.generate(PROMPT, **options), plain)
        assert hasattr(model, "_compiled_call")
        assert paths(spans) == ["generate", "generate/prefill", *["generate/decode"] * 3]

    def test_decodes_of_a_model_that_the_program_compiled(self):
        """A model that the program has compiled has its steps as others do, and beside them what it waited for."""
        model = gpt2()
        model.compile(backend="eager")
        with recorded("transformers") as spans:
            model.generate(PROMPT, **{**GREEDY, "max_new_tokens": 2})
        assert without_compilations(paths(spans)) == ["generate", "generate/prefill", "generate/decode"]
        assert "generate/prefill/torch.compile" in paths(spans)

    def test_a_model_with_a_generate_of_its_own(self):
        """A class whose own `generate` calls the decoding loop, and not the common one, has the stages of the loop."""

        class Own(GPT2LMHeadModel):
            def generate(self, input_ids):
                """Generate three tokens."""
                config = GenerationConfig(do_sample=False)
                config._pad_token_tensor = None
                stop = StoppingCriteriaList([MaxLengthCriteria(6)])
                return self._sample(input_ids, LogitsProcessorList(), stop, config, use_cache=True)

        model = Own(gpt2().config).eval()
        with recorded("transformers") as spans, torch.inference_mode():
            model.generate(PROMPT)
        assert paths(spans) == ["generate", "generate/prefill", *["generate/decode"] * 2]
        (found,) = attributes(spans, "generate")
        assert (found["new_tokens"], found["gen_ai.usage.input_tokens"]) == (3, 6)
        assert found["gen_ai.operation.name"] == "text_completion"

    def test_a_client_that_streams_has_the_first_token_when_it_is_said(self):
        """The time to the first token by the host's clock is when the streamer had it, to a few milliseconds."""
        had = []

        class Client:
            def put(self, value):
                had.append(time.perf_counter())

            def end(self):
                had.append(time.perf_counter())

        model = gpt2()
        model.generate(PROMPT[:1], **GREEDY)
        with recorded("transformers") as spans:
            began = time.perf_counter()
            model.generate(PROMPT[:1], streamer=Client(), **GREEDY)
        (found,) = attributes(spans, "generate")
        first, last = had[1], had[-1]  # The prompt comes before.
        assert found["gen_ai.server.time_to_first_token"] == pytest.approx(first - began, abs=0.01)
        assert found["gen_ai.server.time_per_output_token"] == pytest.approx((last - first) / 3, abs=0.01)

    def test_one_token_alone(self):
        """It has a time to the first token and none per further one; of an assistant neither is told."""
        with recorded("transformers") as spans:
            gpt2().generate(PROMPT, **{**GREEDY, "max_new_tokens": 1})
            gpt2(layers=2).generate(PROMPT[:1], assistant_model=gpt2(), **GREEDY)
        alone, assisted, *inner = attributes(spans, "generate")
        assert alone["gen_ai.server.time_to_first_token"] > 0
        assert "gen_ai.server.time_per_output_token" not in alone
        assert assisted["gen_ai.server.time_to_first_token"] > 0
        assert not any("gen_ai.server.time_to_first_token" in each for each in inner)

    def test_streams_from_threads_of_their_own(self):
        """Two threads that generate with one model at once, and stream, have each their own trace and steps."""
        model, words = gpt2(), tokenizer()

        def stream():
            streamer = TextIteratorStreamer(words)
            thread = threading.Thread(
                target=model.generate, args=(PROMPT[:1],), kwargs={"streamer": streamer, **GREEDY}
            )
            thread.start()
            return thread, streamer

        with recorded("transformers") as spans:
            for thread, streamer in [stream(), stream()]:
                assert "".join(streamer)
                thread.join()
        assert len({span.trace_id for span in spans}) == 2
        assert sorted(paths(spans)) == sorted(2 * ["generate", "generate/prefill", *["generate/decode"] * 3])

    def test_an_error_within(self):
        """A failing step ends its stages, and the next `generate` is as if nothing had been."""

        class Broken(LogitsProcessor):
            def __call__(self, input_ids, scores):
                raise RuntimeError("out of words")

        model = gpt2()
        with recorded("transformers") as spans:
            with pytest.raises(RuntimeError, match="out of words"):
                model.generate(PROMPT, logits_processor=[Broken()], **GREEDY)
            model.generate(PROMPT, **GREEDY)
        assert [(span.name, span.status) for span in spans[:2]] == [("generate", "ERROR"), ("prefill", "UNSET")]
        assert paths(spans)[2:] == ["generate", "generate/prefill", *["generate/decode"] * 3]


class TestModels:
    """Models that generate nothing."""

    def test_a_model_alone_is_no_stage(self):
        """A model that is called by the program, not by `generate`, is left to the program to name."""
        with recorded("transformers") as spans:
            gpt2()(PROMPT)
        assert spans == []

    def test_compiles_without_a_break(self):
        """A whole model compiles to one graph with the wrappers there, and answers the same."""
        model = gpt2()
        plain = model(PROMPT).logits
        with recorded("transformers"):
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            assert torch.equal(compiled(PROMPT).logits, plain)


def test_uninstrument_restores_what_was():
    """Afterwards the classes have what they had, and nothing more."""
    owners = (Pipeline, TextClassificationPipeline, PreTrainedModel, GenerationMixin)
    before = [dict(vars(owner)) for owner in owners]
    with recorded("transformers"):
        assert [dict(vars(owner)) for owner in owners] != before
    assert [dict(vars(owner)) for owner in owners] == before
