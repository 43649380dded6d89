"""A model of lmms-eval 0.7: `lmms-eval --model storm_jax --model_args checkpoint=DIR,frames=128`.

Only lmms-eval imports this module; docs/evaluation.md says how it is installed.
"""

import io
import logging
from collections.abc import Sequence
from typing import Any

# pyrefly: ignore[missing-import]
from lmms_eval.api.instance import GenerationResult, TokenCounts

# pyrefly: ignore[missing-import]
from lmms_eval.api.model import lmms

# pyrefly: ignore[missing-import]
from lmms_eval.protocol import ChatMessages

from storm_jax import checkpoint as checkpoints
from storm_jax.data import text
from storm_jax.data.conversation import Media, Turn
from storm_jax.data.video import MediaError
from storm_jax.evaluation import health, runner
from storm_jax.evaluation.answering import Answering, Outcome, Request
from storm_jax.inference.engine import Engine
from storm_jax.inference.media import Decoders
from storm_jax.inference.options import Options
from storm_jax.inference.sampling import Sampling
from storm_jax.inference.tokenizer import load_tokenizer
from storm_jax.inference.weights import Quantization

_log = logging.getLogger(__name__)
_SLOTS = 8


class StormJax(lmms):
    """A chat model that generates; it takes all devices of one process.

    Media of a message stand on lines of their own before the text that follows them, as in the
    native evaluation's `lmms` prompts. A medium that cannot be read gives the answer "".
    """

    is_simple = False

    def __init__(
        self,
        checkpoint: str,
        batch_size: int | str | None = None,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        frames: int | str = 0,
        fps: float | str | None = None,
        temporal_sampling: int | str = 0,
        temporal_pool: int | str = 0,
        spatial_pool: int | str = 0,
        duplicate_threshold: float | str = 0.0,
        keep_tokens: float | str = 1.0,
        quantization: Quantization = "",
        decode_timeout: float | str = 0.0,
        decoders: int | str = 0,
        devices_per_engine: int | str = 1,
    ):
        """Args:
        checkpoint: a training workdir, or one checkpoint.
        batch_size: answers that a device makes at one time; "1", lmms-eval's default, is 8.
        max_batch_size, device: lmms-eval passes them; JAX's devices are all taken.

        The rest is as the flags of `storm_jax.evaluate`.
        """
        super().__init__()
        self.checkpoint, self._quantization = checkpoint, quantization
        self._slots = int(batch_size or 1) if str(batch_size or 1) != "1" else _SLOTS
        self._per_engine = int(devices_per_engine)
        self._options = Options(
            frames=int(frames),
            temporal_sampling=int(temporal_sampling),
            temporal_pool=int(temporal_pool),
            spatial_pool=int(spatial_pool),
            duplicate_threshold=float(duplicate_threshold),
            keep_tokens=float(keep_tokens),
        )
        self._config = runner.with_decoding(
            self._options.apply(checkpoints.read_config(self.checkpoint)),
            fps=None if fps is None else float(fps),
            timeout=float(decode_timeout),
        )
        self._tokenizer = load_tokenizer(self.checkpoint, self._config)
        self._stops = text.stop_tokens(self._tokenizer, self._config.data.chat_template)
        self._decoders = Decoders(int(decoders))
        self._engines: list[Engine] = []

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answers, in the order of the requests."""
        asked = [self._request(i, request) for i, request in enumerate(requests)]
        order: dict[tuple[Media, ...], list[Request]] = {}
        for request in asked:
            order.setdefault(request.media, []).append(request)
        needed, failed = 1, {}
        for media, group in order.items():
            try:
                needed = max(needed, *self._needed(media, group))
            except MediaError as error:
                failed[media] = str(error)
        sound = [r for media, group in order.items() if media not in failed for r in group]
        outcomes = {
            request.key: Outcome(request, error=failed[request.media])
            for request in asked
            if request.media in failed
        }
        if sound:
            engines = self._engines_for(needed, len(order))
            answering = Answering(
                engines, self._tokenizer, self._decoders, self._config, self._options
            )
            for outcome in answering.run(sound):
                assert outcome.request is not None
                outcomes[outcome.request.key] = outcome
        self._warn(list(outcomes.values()))
        results = []
        for i, request in enumerate(requests):
            outcome = outcomes[i]
            self.cache_hook.add_partial(
                "generate_until", (request.args[0], request.args[2]), outcome.output
            )
            counts = TokenCounts(outcome.prompt_tokens, outcome.output_tokens)
            results.append(GenerationResult(outcome.output, counts))
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("storm_jax generates; choose a task of type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("storm_jax answers single questions; choose another task")

    def _request(self, key: int, request: Any) -> Request:
        # The guide says that there are five; at run time there are six.
        _, doc_to_messages, wishes, doc_id, task, split = request.args[:6]
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        turns, media = [], []
        for message in messages.messages:
            pieces = []
            for content in message.content:
                match content.type:
                    case "text":
                        pieces.append(text.PLACEHOLDER.sub("", content.text))
                    case "video":
                        media.append(
                            Media("video", content.url, content.start_time, content.end_time)
                        )
                        pieces.append("<video>")
                    case "image":
                        media.append(_image(content.url))
                        pieces.append("<image>")
                    case other:
                        raise ValueError(f"{task}: item {doc_id} has {other}; storm_jax sees only")
            turns.append(Turn(message.role, "\n".join(pieces)))
        stop = wishes.get("until") or ()
        return Request(
            key,
            tuple(media),
            tuple(turns),
            self._sampling(wishes),
            (stop,) if isinstance(stop, str) else tuple(stop),
        )

    def _sampling(self, wishes: dict[str, Any]) -> Sampling:
        if int(wishes.get("num_beams") or 1) != 1:
            raise ValueError(f"num_beams={wishes['num_beams']}: storm_jax has no beam search")
        temperature = float(wishes.get("temperature") or 0.0)
        return Sampling(
            max_new_tokens=int(wishes.get("max_new_tokens") or 1024),
            temperature=temperature if wishes.get("do_sample") else 0.0,
            top_p=float(wishes.get("top_p") or 1.0),
            stop_tokens=self._stops,
        )

    def _needed(self, media: tuple[Media, ...], group: list[Request]) -> list[int]:
        """Tokens of each request and of its longest answer."""
        config, model = self._config, self._config.model
        size, limit = model.vit.image_size, config.data.decode_timeout
        opened = [self._decoders.clip(m, config.data.frames, size, limit) for m in media]
        frames = [len(clip.result().times) for clip in opened]
        counts = [self._options.tokens_kept(model, n, n).pruned for n in frames]
        return [
            len(r.tokens(self._tokenizer, config, counts)) + r.sampling.max_new_tokens
            for r in group
        ]

    def _engines_for(self, needed: int, most: int) -> list[Engine]:
        if not self._engines or self._engines[0].context < needed:
            self._engines = []  # lets the memory of the old caches go
            self._engines = runner.engines_for(
                self.checkpoint,
                quantization=self._quantization,
                slots=self._slots,
                context=runner.rounded(needed),
                per_engine=self._per_engine,
                most=most,
            )
        return self._engines

    def _warn(self, outcomes: Sequence[Outcome]) -> None:
        for error in dict.fromkeys(o.error for o in outcomes if o.error):
            _log.warning("answered with nothing: %s", error)
        bad = sum(bool(health.faults(o.output, o.finite, o.finish)) for o in outcomes)
        if bad:
            _log.warning(
                "degenerate output (empty, repetition, NaN) in %s of %s", bad, len(outcomes)
            )


def _image(picture: Any) -> Media:
    if isinstance(picture, str):
        return Media("image", picture)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return Media("image", "an image of the task", data=buffer.getvalue())
