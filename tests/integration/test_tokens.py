"""How many tokens a row has got so far, which only vLLM's output processor knows."""

import time
from types import SimpleNamespace

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from airflow_provider_raylm.cluster.replica.questions.vllm import Vllm


def test_tokens_are_counted_before_an_answer_is_complete():
    """By the name under which the row was asked, although nothing is given out before its end."""
    sampling = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, detokenize=False)
    fields = [name for name in EngineCoreRequest.__struct_fields__ if name not in EngineCoreRequest.__struct_defaults__]
    request = EngineCoreRequest(
        **{**dict.fromkeys(fields), "request_id": "inner", "prompt_token_ids": [1, 2], "sampling_params": sampling}
        | {"arrival_time": time.time(), "external_req_id": "block-0"}
    )
    processor = OutputProcessor(None, log_stats=False)
    processor.add_request(request, None, queue=RequestOutputCollector(sampling.output_kind, "inner"))
    asking = SimpleNamespace(client=SimpleNamespace(output_processor=processor))

    assert Vllm.tokens(asking, ["block-0"]) == {"block-0": 0}
    processor.process_outputs([EngineCoreOutput(request_id="inner", new_token_ids=[5, 6, 7])])
    assert Vllm.tokens(asking, ["block-0"]) == {"block-0": 3}
