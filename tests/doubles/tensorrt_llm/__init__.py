"""A TensorRT-LLM without an engine: it takes the arguments that the real one documents, and no others.

`LLM` answers a prompt with the numbers after its first id, and tells of itself in LLM.made. What is scripted by a
prompt's first id: 900 fails when it is handed over, 901 while it is answered, 902 is cancelled, 903 comes two tokens
at a time, 904 has metrics of another clock, 905 breaks the engine.
"""

from __future__ import annotations

from tensorrt_llm.llm import LLM
from tensorrt_llm.llmapi import SamplingParams

__all__ = ["LLM", "SamplingParams", "__version__"]

__version__ = "1.3.0"
