"""What the engine counts of a generation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Timings:
    """Seconds and tokens of the last generation; `load_s` of the load."""

    load_s: float = 0.0
    prompt_s: float = 0.0
    n_prompt: int = 0
    decode_s: float = 0.0
    n_decoded: int = 0
    ttft_s: float = 0.0  # from the start of prefill to the first token chosen
    sample_s: float = 0.0
    n_sampled: int = 0

    def __add__(self, other: Timings) -> Timings:
        """Both generations together; load and first token of the first."""
        return Timings(
            self.load_s, self.prompt_s + other.prompt_s, self.n_prompt + other.n_prompt,
            self.decode_s + other.decode_s, self.n_decoded + other.n_decoded,
            self.ttft_s or other.ttft_s, self.sample_s + other.sample_s,
            self.n_sampled + other.n_sampled,
        )  # fmt: skip
