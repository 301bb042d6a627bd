"""Options that llama.cpp or ik_llama.cpp know and mlacli's table has not: what becomes of each.

"no effect": accepted with a note, because results, mode, device and memory stay as they are;
"renamed": done under our name; "refused": all else, with why and what to do instead. How many
values an option takes is in `dialects/*.json`, extracted from their sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from mlacli.errors import UsageError


@dataclass(frozen=True, slots=True)
class Foreign:
    """What becomes of some options; values in `neutral` ask for what happens anyway."""

    names: tuple[str, ...]
    verdict: Literal["renamed", "no effect", "refused"]
    why: str
    hint: str = ""
    becomes: tuple[str, ...] = ()  # our flag, and its value where that is fixed
    neutral: tuple[str, ...] = ()

    def error(self, word: str) -> UsageError:
        why = f": {self.why}" if self.why else ""
        return UsageError(f"{word} is not supported{why}", self.hint or "leave it out")

    def is_neutral(self, text: str | None) -> bool:
        """Whether this value asks for what happens anyway; numbers compare as numbers."""
        return text is not None and any(_same(text, word) for word in self.neutral)


def _same(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return a.lower() == b


def _no(names: str, why: str, hint: str = "", neutral: str = "") -> Foreign:
    return Foreign(tuple(names.split()), "refused", why, hint, neutral=tuple(neutral.split()))


def _idle(names: str, why: str) -> Foreign:
    return Foreign(tuple(names.split()), "no effect", why)


def _as(names: str, *becomes: str) -> Foreign:
    why = f"spelled {' '.join(becomes)} here"
    return Foreign(tuple(names.split()), "renamed", why, becomes=becomes)


SERVER = "mlacli has no server"
_TOOLS = "chats call no tools"
_DRAFT = "there is no speculative decoding"
_SAMPLER = "the sampler chain has no such stage"
_TEXT = "text models only"
_MERGE = "merge the adapter into the GGUF file first"
_DOWNLOAD = "nothing is downloaded"
_GET = "download the file and give it with -m"
_TOOL = "an option of another llama.cpp tool, which mlacli has no counterpart of"
_PPL = "mlacli perplexity measures perplexity and KL divergence only"
_MARGIN = "set what stays free with --margin; `mlacli plan` shows what fits"
_FIT = "arguments are not adjusted to the memory"

FOREIGN: tuple[Foreign, ...] = (
    # --- spelled otherwise
    _as("-no-fa --no-flash-attn", "-fa", "off"),
    _as("-smf16 --split-mode-f16", "-grt", "f16"),
    _as("-smf32 --split-mode-f32", "-grt", "f32"),
    _as("--log-disable", "-lv", "0"),
    # --- loading and placement
    _idle(
        "-lm --load-mode -lzm --lazy-mode -dio --direct-io -ndio"
        " --no-direct-io -thp --transparent-huge-pages --defer-experts --prefetch-experts"
        " --prefetch-experts-threads",
        "weights are mapped, and each rank reads only its own part",
    ),
    _idle(
        "--numa -C --cpu-mask -Cr --cpu-range --cpu-strict --prio --poll -Cb --cpu-mask-batch"
        " -Crb --cpu-range-batch --cpu-strict-batch --prio-batch --poll-batch",
        "where threads run is left to the system",
    ),
    _idle("-tb --threads-batch", "-t sets the threads of prefill and decode"),
    _idle("--repack -nr --no-repack --no-host", "the CPU keeps weights as they are in the file"),
    _idle("--no-op-offload -no-ooae --no-offload-only-active-experts", "no tensor is copied over"),
    _no("--op-offload -op --offload-policy", "tensors are computed where they lie"),
    _no("-vq --validate-quants", "its name is another here", "use --check-tensors"),
    _no("-nkvo --no-kv-offload", "the cache lies where its layers are computed", "use -ngl"),
    _idle("-kvo --kv-offload", "the cache lies where its layers are computed"),
    _no("-ncffn --n-cpu-ffn", "dense layers can't be placed by name", "use -ngl"),
    _no("-fit --fit", _FIT, _MARGIN, neutral="off 0 disabled false"),
    _no("-fitt --fit-target -gfm --gpu-fit-margin --fit-margin", _FIT, _MARGIN),
    _no("-fitc --fit-ctx -fitp --fit-print", _FIT, _MARGIN),
    _no("-dr --dry-run --docker-repo", _DOWNLOAD, "for a dry run use `mlacli plan`"),
    _no("--rpc", "ranks run on the devices of -dev"),
    # --- attention, cache, experts
    _no("-khad --k-cache-hadamard -vhad --v-cache-hadamard", "cached rows are not transformed",
        "use -ctk f16"),
    _no("-ctk-first --cache-type-k-first -ctk-last --cache-type-k-last",
        "one type for all layers", "use -ctk"),
    _idle("-ctv-first --cache-type-v-first -ctv-last --cache-type-v-last",
          "one type for all layers, as for any MLA cache"),
    _idle("-fidx --fused-indexer-topk", "kernels are fused where they can be"),
    _no("-ser --smart-expert-reduction", "it leaves experts out and changes results"),
    _idle("-ger --grouped-expert-routing", "models with expert groups are always routed by them"),
    _idle("-fmoe --fused-moe -no-fmoe --no-fused-moe -no-fug --no-fused-up-gate -no-mmad"
          " --no-fused-mul-multiadd -fdn --fused-delta-net",
          "how operations are fused is not an option"),
    _idle("-mqkv --merge-qkv", "MLA models have no q, k and v to merge"),
    _idle("-rcache --rope-cache", "angles are computed once a step"),
    _idle("-gr --graph-reuse -no-gr --no-graph-reuse -smgs --split-mode-graph-scheduling -sas"
          " --scheduler-async -cuda --cuda-params", "there is no graph scheduler to tune"),
    _idle("-mea --max-extra-alloc -wgt --worst-graph-tokens", "the plan sizes all memory at once"),
    _idle("--swa-full --swa-compress", "MLA models have no sliding window"),
    _idle("-dt --defrag-thold -kvu --kv-unified -no-kvu --no-kv-unified --kv-unified-per-slot",
          "one sequence fills the cache from the start"),
    _no("-np --parallel -ns --sequences", "one sequence at a time", neutral="1"),
    _no("-gan --grp-attn-n", "self-extend changes results", neutral="1"),
    _idle("-gaw --grp-attn-w", "it counts with -gan only"),
    _no("--attention", "text generation is causal", neutral="causal"),
    _no("--rope-scaling --rope-scale --yarn-attn-factor --yarn-beta-fast --yarn-beta-slow"
        " --yarn-ext-factor --yarn-orig-ctx", "positions follow the file",
        "set the metadata key with --override-kv"),
    _no("--rope-freq-base --rope-freq-scale", "positions follow the file",
        "set the metadata key with --override-kv", neutral="0"),
    _no("--context-shift", "MLA caches are not shifted", "give a larger -c", neutral="off 0"),
    _idle("--no-context-shift --keep", "MLA caches are never shifted"),
    # --- sampling
    _no("--expiring-logit-bias-file --banned-string-file --banned-n --allowlist-unicode-rule"
        " --allowlist-pieces --allowlist-keyword --allowlist-keyword-delay", _SAMPLER,
        "use -l or --grammar"),
    _no("--tfs", _SAMPLER, neutral="1"),
    _no("--adaptive-target", _SAMPLER, neutral="-1"),
    _idle("--penalize-nl", "penalties hold for newlines as for any token"),
    _idle("--adaptive-decay --adaptive-updt-w-cur",
          "it counts only with a sampler that is refused"),
    _idle("-bs --backend-sampling", "sampling gives the same tokens wherever it runs"),
    _no("--cfg-scale", "no second prompt is evaluated", neutral="1"),
    _no("--cfg-negative-prompt --cfg-negative-prompt-file", "no second prompt is evaluated"),
    # --- prompt and chat
    _idle("--jinja", "chat templates are always rendered by jinja"),
    _no("--no-jinja", "chat templates are always rendered by jinja",
        "name a built-in one with --chat-template"),
    _no("--peg --skip-chat-parsing --no-skip-chat-parsing",
        "answers are cut into thought and text alone", "use --reasoning-format"),
    _no("--in-prefix-bos", "BOS stands at the start of a text alone"),
    _no("--prefill-assistant --no-prefill-assistant", "an answer begins empty"),
    _no("--reasoning-budget", "thoughts have no budget", "use -rea off, or -n", neutral="-1"),
    _no("--reasoning-budget-message --reasoning-tokens", "thoughts have no budget"),
    _no("--reasoning-effort --reasoning-preserve --no-reasoning-preserve",
        "what a template takes differs", "use --chat-template-kwargs"),
    _no("-ptcall --parallel-tool-calls -ag --agent -no-ag --no-agent --tools --tools-runtime"
        " --mcp-servers-config --mcp-servers-json --server-base", _TOOLS),
    _no("-sp --special", "special tokens are not printed"),
    _no("-bf --binary-file --in-file", "prompts are text", "use -f"),
    _no("--infill --spm-infill", "there is no infilling"),
    # --- output and logs
    _idle("-co --color --log-colors --log-prefix --no-log-prefix --log-timestamps"
          " --no-log-timestamps --verbose-prompt -ptc --print-token-count --minilog --log-enable"
          " --no-log-jsonl", "it changes only what is shown, or when time is taken"),
    _idle("--show-timings --no-show-timings", "timings are shown unless --no-perf is given"),
    _no("--log-new --log-append -ld --logdir --log-format --log-prompts-dir --log-test",
        "logs go where --log-file and --log-jsonl say"),
    _no("-dkvc --dump-kv-cache --logits-output-dir --save-logits", "internals are not dumped"),
    _no("--completion-bash", "the shell asks mlacli itself",
        'put `eval "$(_MLACLI_COMPLETE=bash_source mlacli)"` in .bashrc'),
    # --- where models come from
    _no("-hf -hfr --hf-repo -hff --hf-file -hft --hf-token -mu --model-url -cl --cache-list"
        " --embd-gemma-default --fim-qwen-1.5b-default --fim-qwen-3b-default"
        " --fim-qwen-7b-default --fim-qwen-7b-spec --fim-qwen-14b-spec --fim-qwen-30b-default"
        " --gpt-oss-20b-default --gpt-oss-120b-default --vision-gemma-4b-default"
        " --vision-gemma-12b-default --dflash --eagle3 --mtp", _DOWNLOAD, _GET),
    _idle("--offline", _DOWNLOAD),
    _no("--lora --lora-scaled --lora-init-without-apply", "there are no adapters", _MERGE),
    _no("--control-vector --control-vector-scaled --control-vector-layer-range",
        "there are no control vectors"),
    _no("-mm --mmproj -mmu --mmproj-url --mmproj-auto --mmproj-offload -mmdev --mmproj-device"
        " --image --audio --video --image-min-tokens --image-max-tokens --mtmd-kq-type"
        " --mtmd-batch-max-tokens -tm --threads-mtmd --media-path --video-ffmpeg-dir --video-fps"
        " --video-timestamp-interval", _TEXT),
    _idle("--no-mmproj --no-mmproj-auto --no-mmproj-offload", _TEXT),
    # --- speculative decoding
    _idle("-no-mtp --no-multi-token-prediction", "blocks for multi-token prediction are skipped"),
    _no("--spec-type", _DRAFT, neutral="none"),
    _no("-md --model-draft --spec-draft-model -hfd -hfrd --hf-repo-draft --spec-draft-hf -cd"
        " --ctx-size-draft -devd --device-draft --spec-draft-device -ngld --gpu-layers-draft"
        " --n-gpu-layers-draft --spec-draft-ngl -td --threads-draft --spec-draft-threads -tbd"
        " --threads-batch-draft --spec-draft-threads-batch -ctkd --cache-type-k-draft"
        " --spec-draft-type-k -ctvd --cache-type-v-draft --spec-draft-type-v -Cd"
        " --cpu-mask-draft --spec-draft-cpu-mask -Cbd --cpu-mask-batch-draft"
        " --spec-draft-cpu-mask-batch -Crd --cpu-range-draft --spec-draft-cpu-range -Crbd"
        " --cpu-range-batch-draft --spec-draft-cpu-range-batch --cpu-strict-draft"
        " --spec-draft-cpu-strict --cpu-strict-batch-draft --spec-draft-cpu-strict-batch"
        " --prio-draft --spec-draft-prio --prio-batch-draft --spec-draft-prio-batch --poll-draft"
        " --spec-draft-poll --poll-batch-draft --spec-draft-poll-batch -cmoed --cpu-moe-draft"
        " --spec-draft-cpu-moe -ncmoed --n-cpu-moe-draft --spec-draft-ncmoe"
        " --spec-draft-n-cpu-moe -otd --override-tensor-draft --spec-draft-override-tensor"
        " -draft --draft-params --draft --draft-n --draft-max --draft-min --draft-n-min"
        " --spec-draft-n-max --spec-draft-n-min --draft-p-min --spec-draft-p-min --draft-p-split"
        " --spec-draft-p-split --spec-draft-backend-sampling --no-spec-draft-backend-sampling"
        " --spec-default --spec-replace --spec-ckpt-mode --recurrent-ckpt-mode --spec-autotune"
        " --spec-stage --spec-ngram-size-n --spec-ngram-size-m --spec-ngram-min-hits"
        " --spec-ngram-simple-size-n --spec-ngram-simple-size-m --spec-ngram-simple-min-hits"
        " --spec-ngram-map-k-size-n --spec-ngram-map-k-size-m --spec-ngram-map-k-min-hits"
        " --spec-ngram-map-k4v-size-n --spec-ngram-map-k4v-size-m --spec-ngram-map-k4v-min-hits"
        " --spec-ngram-mod-n-match --spec-ngram-mod-n-max --spec-ngram-mod-n-min"
        " --spec-synth-len --spec-synth-rates --suffix-pattern-len --suffix-max-depth"
        " --suffix-corpus -ps --p-split -lcs --lookup-cache-static -lcd --lookup-cache-dynamic"
        " -mtp --multi-token-prediction -mtprot --mtp-requantize-output-tensor", _DRAFT),
    # --- server
    _idle("-cb --cont-batching -nocb --no-cont-batching --no-slots --no-ui --no-webui"
          " --no-ui-mcp-proxy --no-webui-mcp-proxy --cache-prompt --no-cache-prompt"
          " --no-cache-idle-slots --no-models-autoload --no-cors-credentials", SERVER),
    _no("--host --port --reuse-port --path --api-prefix --api-key --api-key-file --ssl-key-file"
        " --ssl-cert-file -to --timeout --threads-http -a --alias --tags --metrics --props"
        " --slots --slot-save-path -sps --slot-prompt-similarity --cache-reuse -cram --cache-ram"
        " -crs --cache-ram-similarity -cram-n-min --cache-ram-n-min -ctxcp --ctx-checkpoints"
        " --swa-checkpoints -ctx-ckpt -ctx-ckpt-i --ctx-checkpoints-interval -ctx-ckpt-t"
        " --ctx-checkpoints-tolerance -ctx-ckpt-e --ctx-checkpoints-eviction -cms"
        " --checkpoint-min-step --cache-idle-slots --ui --webui --ui-config --webui-config"
        " --ui-config-file --webui-config-file --ui-mcp-proxy --webui-mcp-proxy --send-done"
        " --sse-ping-interval --sleep-idle-seconds --models-dir --models-max --models-preset"
        " --models-autoload --sql-save-file --sqlite-zstd-ext-file --cors-credentials"
        " --cors-headers --cors-methods --cors-origins", SERVER, "use run-model"),
    # --- other tools
    _no("--embedding --embeddings --embd-normalize --embd-output-format --embd-separator --rerank"
        " --reranking --cls-separator", "there are no embeddings"),
    _no("--pooling", "there are no embeddings", neutral="none"),
    _no("--perplexity --all-logits --ppl-output-type --hellaswag --hellaswag-tasks --winogrande"
        " --winogrande-tasks --multiple-choice --multiple-choice-tasks", _PPL),
    _no("-o --output --output-file --output-draft --draft-output --draft-output-file -ofreq"
        " --output-frequency --save-frequency --process-output --output-tensor-name --no-ppl --ppl"
        " --chunk --from-chunk --show-statistics --positive-file --negative-file --pca-batch"
        " --pca-iter --method -pps -npp -ntg -npl -tgs --context-file --chunk-size"
        " --chunk-separator --junk --pos --diffusion-add-gumbel-noise --diffusion-alg-temp"
        " --diffusion-algorithm --diffusion-block-length --diffusion-cfg-scale --diffusion-eps"
        " --diffusion-steps --diffusion-visual --tts-lang --tts-speaker-file --check --stdin"
        " --ids --no-bos --parse-special --no-parse-special --show-count --tensor-filter"
        " -decay-epochs --learning-rate-decay-epochs -epochs --epochs -lr --learning-rate"
        " -lr-min --learning-rate-min -opt --optimizer -val-split --val-split -wd"
        " --weight-decay", _TOOL),
)  # fmt: skip

BY_NAME: Mapping[str, Foreign] = MappingProxyType({n: f for f in FOREIGN for n in f.names})
