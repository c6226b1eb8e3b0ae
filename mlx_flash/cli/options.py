"""The options of `generate` and `cache-prompt`: mlx-lm's, by its names and defaults, and ours."""

from typing import Annotated

import typer

from ..config import policies, readers

MODEL = "Model   e.g. --model mlx-community/Qwen3.5-35B-A3B-4bit --revision main"
STREAMING = "Streaming   e.g. --ram 8GB --context 16384"
PROMPT = "Prompt   e.g. --system-prompt 'Answer in French.' 'Where does Mira live?'"
SAMPLING = "Sampling   e.g. --temp 0.7 --top-p 0.9 --seed 1"
CACHE = "Cache   e.g. --prefill-step-size 512 --prompt-cache-file prefix.safetensors"
OUTPUT = "Output   e.g. --json > answer.json"

Model = Annotated[
    str | None,
    typer.Option(
        help="A model folder or a Hub repository. Without it: the embedded demo model.",
        rich_help_panel=MODEL,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of the repository.", rich_help_panel=MODEL),
]
AdapterPath = Annotated[
    str | None,
    typer.Option(help="LoRA weights, for layers that are not experts.", rich_help_panel=MODEL),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python that the checkpoint brings.", rich_help_panel=MODEL
    ),
]
ExtraEosToken = Annotated[
    list[str] | None,
    typer.Option(
        help="One more token that ends the text, or its number. Repeatable.", rich_help_panel=MODEL
    ),
]
EosToken = Annotated[
    str | None,
    typer.Option(help="The tokenizer's token at the end of a text.", rich_help_panel=MODEL),
]
QuantizeActivations = Annotated[
    bool,
    typer.Option(
        "--quantize-activations",
        "-qa",
        help="Quantize activations like the weights (nvfp4, mxfp8).",
        rich_help_panel=MODEL,
    ),
]
DraftModel = Annotated[
    str | None,
    typer.Option(
        help="A small model for speculative decoding. It is loaded whole, within --ram.",
        rich_help_panel=MODEL,
    ),
]
NumDraftTokens = Annotated[
    int, typer.Option(min=1, help="Tokens to draft at a time.", rich_help_panel=MODEL)
]

Ram = Annotated[
    str,
    typer.Option(
        help="Ceiling on the whole process: 8GB, 1.5GiB, 60% of the machine, or auto: most of "
        "what is free, within a container's limit. Below the model's floor it refuses.",
        rich_help_panel=STREAMING,
    ),
]
Slots = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Experts in RAM per layer, instead of what --ram gives. Of a model without experts: "
        "whole layers in RAM.",
        rich_help_panel=STREAMING,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens of context to leave room for. Without it: the prompt and --max-tokens.",
        rich_help_panel=STREAMING,
    ),
]
Policy = Annotated[
    str,
    typer.Option(
        help=f"Which expert gives up its slot: {', '.join(policies())}.",
        rich_help_panel=STREAMING,
    ),
]
Reader = Annotated[
    str,
    typer.Option(
        help="How bytes come from disk: pread through the page cache, direct past it, auto: direct "
        f"where there is one. There are {', '.join(readers())}.",
        rich_help_panel=STREAMING,
    ),
]
Kernels = Annotated[
    str,
    typer.Option(
        help="Who computes: native, the compiled kernels; reference, MLX's own operations; "
        "graph, MLX's own with experts fetched inside its graph, never tried on a GPU; "
        "metal, ours on a Mac, where mlx-flash selftest tries them first; "
        "auto: native on a CPU, where they are built.",
        rich_help_panel=STREAMING,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, help="Threads that compute. Without it: one per core.", rich_help_panel=STREAMING
    ),
]

PromptArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[PROMPT]",
        help="What to say to the model; - or a pipe reads it from standard input.",
        show_default=False,
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option("--prompt", "-p", help="The same, as mlx-lm spells it.", rich_help_panel=PROMPT),
]
SystemPrompt = Annotated[
    str | None, typer.Option(help="A system turn before the prompt.", rich_help_panel=PROMPT)
]
PrefillResponse = Annotated[
    str | None,
    typer.Option(help="How the answer must begin.", rich_help_panel=PROMPT),
]
IgnoreChatTemplate = Annotated[
    bool,
    typer.Option("--ignore-chat-template", help="Continue the raw text.", rich_help_panel=PROMPT),
]
ChatTemplateConfig = Annotated[
    str | None,
    typer.Option(
        help="""Template variables as JSON: '{"enable_thinking": true}'.""",
        rich_help_panel=PROMPT,
    ),
]
MaxTokens = Annotated[
    int,
    typer.Option(
        "--max-tokens", "-m", help="Most tokens to generate; -1: until --context is full.",
        rich_help_panel=SAMPLING,
    ),
]  # fmt: skip
Temp = Annotated[
    float, typer.Option(min=0.0, help="Temperature; 0 is greedy.", rich_help_panel=SAMPLING)
]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.", rich_help_panel=SAMPLING)
]
MinP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Min-p sampling.", rich_help_panel=SAMPLING)
]
TopK = Annotated[
    int, typer.Option(min=0, help="Sample among the best k; 0: all.", rich_help_panel=SAMPLING)
]
XtcProbability = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, help="How often XTC sampling happens.", rich_help_panel=SAMPLING
    ),
]
XtcThreshold = Annotated[
    float,
    typer.Option(
        min=0.0, max=0.5, help="Probability above which XTC drops.", rich_help_panel=SAMPLING
    ),
]
MinTokensToKeep = Annotated[
    int, typer.Option(min=1, help="Least tokens that min-p keeps.", rich_help_panel=SAMPLING)
]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampler.", rich_help_panel=SAMPLING)]

MaxKvSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Longest key-value cache, where the model permits.", rich_help_panel=CACHE
    ),
]
PrefillStepSize = Annotated[
    int,
    typer.Option(
        min=1,
        help="Most prompt tokens at a time. The plan takes fewer where scratch is short.",
        rich_help_panel=CACHE,
    ),
]
PromptCacheFile = Annotated[
    str | None,
    typer.Option(
        help="A cache that mlx-flash cache-prompt or mlx_lm.cache_prompt wrote.",
        rich_help_panel=CACHE,
    ),
]
NewPromptCacheFile = Annotated[
    str,
    typer.Option(
        "--prompt-cache-file",
        help="The file to write, *.safetensors. What is there is replaced.",
        rich_help_panel=CACHE,
    ),
]
KvBits = Annotated[
    int | None, typer.Option(help="Bits of a quantized key-value cache.", rich_help_panel=CACHE)
]
KvGroupSize = Annotated[int, typer.Option(help="Its group size.", rich_help_panel=CACHE)]
QuantizedKvStart = Annotated[
    int, typer.Option(help="The token from which it is quantized.", rich_help_panel=CACHE)
]

Json = Annotated[
    bool,
    typer.Option("--json", help="One JSON object: text and figures.", rich_help_panel=OUTPUT),
]
Verbose = Annotated[
    str,
    typer.Option(metavar="T|F", help="F: the text alone, without figures.", rich_help_panel=OUTPUT),
]
Debug = Annotated[
    bool,
    typer.Option("-v", "--debug", help="Show the plan, and tracebacks.", rich_help_panel=OUTPUT),
]
