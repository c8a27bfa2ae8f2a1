"""The registry of methods: what each YAML in configs/methods/ is, where it comes from, and what was decided on the way.

`protomem recipes` prints it; what can be read off a config (the parts) is derived from the YAML, not repeated here.
Symbols: x unit embedding, a = |embedding|, W_j prototypes, θ_j angle between x and prototype j, y the own identity,
z_j = s·cos θ_j, B images of a batch, D embedding size. [not verified]: common knowledge or a summary that we could not
check against paper or code. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """title; formula; state: what is kept between steps, and where; communication: beyond the plain sharded cross-entropy;
    source: paper; published: defaults of paper or code; ours: what we decided; deviations: where paper and code, or we,
    differ, with the switch; goes_with: what it can be combined with, and what is refused."""

    title: str
    formula: str
    state: str
    communication: str
    source: str
    published: str
    ours: str
    deviations: str
    goes_with: str


NOTHING = "nothing"
ROWS = "one row W_j for each identity, with gradient and momentum, split over ranks (torch.chunk's split)"
MARGINS_GO = "every source of prototypes, the contrast of CoReFace, the unified criterion"
PLAIN = Recipe(
    title="",
    formula="",
    state=ROWS,
    communication=NOTHING,
    source="",
    published="",
    ours="W starts as N(0, 0.01), as in insightface; batch statistics and the loss are those of the global batch",
    deviations="none known",
    goes_with=MARGINS_GO,
)

SOFTMAX = replace(
    PLAIN,
    title="Softmax-Norm (NormFace)",
    formula="z_y = s·cos θ_y",
    source="Wang et al. 2017, NormFace",
    published="s = 64 with s·cos as insightface's sample configs have it",
    goes_with=MARGINS_GO + "; refused: prototypes.empirical.stacked (there is no margin to stack)",
)
COSFACE = replace(
    PLAIN,
    title="CosFace",
    formula="z_y = s·(cos θ_y − m)",
    source="Wang et al. 2018, CosFace, eq. 4",
    published="m = 0.4, s = 64 (insightface on WebFace42M, TFace); others use 0.35",
)
ARCFACE = replace(
    PLAIN,
    title="ArcFace",
    formula="z_y = s·cos(θ_y + m)",
    source="Deng et al. 2019, ArcFace, eq. 3",
    published="m = 0.5 rad, s = 64; beyond π the first code falls back to cos θ − m·sin m (beyond_pi: threshold)",
    ours="true derivative of the margin (margin.gradient: true); W starts as N(0, 0.01)",
    deviations="code bases differ beyond π and in the derivative: margin.beyond_pi, margin.gradient; see arcface_insightface",
)
ARCFACE_INSIGHTFACE = replace(
    ARCFACE,
    title="ArcFace as insightface's arcface_torch trains it",
    formula="value s·cos(θ_y + m), derivative s with respect to cos θ_y",
    published="m = 0.5 rad, s = 64, cos(θ + m) also beyond π (beyond_pi: raw), margin without a derivative (straight_through)",
    ours="W starts as N(0, 0.01)",
    deviations="the true derivative is s·sin(θ + m)/sin θ: 2.19 times this one at 20°, 0.88 times at 90°. insightface "
    "reports at most 69.08 per image, since it clamps the probability; ours is exact",
    goes_with=MARGINS_GO,
)
COMBINED = replace(
    PLAIN,
    title="Combined margin",
    formula="z_y = s·(cos(m1·θ_y + m2) − m3)",
    source="Deng et al. 2019, ArcFace, eq. 4",
    published="m1 = 1, m2 = 0.3, m3 = 0.2, s = 64",
    deviations="insightface's CombinedMarginLoss ignores m2 where m3 > 0 and knows no m1; here all three act",
    goes_with=MARGINS_GO + "; refused: m1 ≠ 1 with another beyond_pi than monotone",
)
PARTIAL_FC = replace(
    COSFACE,
    title="Partial FC",
    formula="CosFace over the batch's identities and random others, rate·C of C rows; negatives with cos > filter_above: z = 0",
    source="An et al. 2022, Partial FC",
    published="rate 0.1 to 0.2 and m = 0.4 on WebFace42M, filter 0.4 in configs for noisy data",
    ours="always max(rate·C, min(B, C)) rows of a shard with C rows, so that no step waits for the device; updates are sparse",
    deviations="with more identities in the batch than rate·C the published code takes those alone; here it is B rows. "
    "margin.filter_above leaves the filtered negative in the denominator with e⁰, as insightface does",
    goes_with="every margin, VPL and EPL (ours: VPL's code insists on all rows), contrast; refused: optimizer.name=lamb",
)
SUBCENTER_ARCFACE = replace(
    ARCFACE,
    title="Sub-center ArcFace",
    formula="cos θ_j = max_k cos(x, W_jk) over the K prototypes of identity j; then ArcFace",
    state="K rows W_jk for each identity, with gradient and momentum, all on the rank of the identity",
    source="Deng et al. 2020 (ECCV), Sub-center ArcFace; settings of the authors' code (insightface, recognition/"
    "subcenter_arcface)",
    published="K = 3, m = 0.5 rad, s = 64; then images more than 75° from their identity's dominant prototype are dropped, and "
    "ArcFace is trained on the others",
    ours="true derivative of the margin; W starts as N(0, 0.01); of equally near prototypes the first has the gradient",
    deviations="as for arcface: margin.beyond_pi, margin.gradient. The second stage is `protomem data clean`",
    goes_with="every margin, sampled prototypes, EPL (whose means stay one for each identity), contrast, the unified criterion; "
    "refused: a memory, VPL (nobody has said which prototype takes the feature)",
)

PROTOTYPE_MEMORY = Recipe(
    title="Prototype Memory",
    formula="p_c = norm(Σ x_j / k) over the k images of identity c in the batch; CosFace over the M stored prototypes",
    state="M rows P, split over ranks (slot s on rank s mod W); slot labels, ages, cursor: integers, the same on every rank",
    communication="nothing: the plan is a function of the gathered labels, and rows have no gradient to send",
    source="Smirnov et al. 2021, arXiv 2105.02103 (IEEE Access 2022)",
    published="a memory of limited size, prototypes from equal weights, written before the loss, oldest dequeued, regular "
    "refresh, any loss; no code and no further value is known to us",
    ours="everything else: 100,000 slots, ring, refresh replaces the row, no gradient into prototypes, empty start, an "
    "image stays in its own prototype, 4 images of an identity, 20 % of a batch drawn again from the memory, CosFace 0.4",
    deviations="every open reading is a key of prototypes.memory and data.sampler: policy, momentum, fill, gradient, "
    "self_exclusion, average, key_encoder, refresh, pick",
    goes_with="every margin, contrast, VPL (ours); refused: EPL (its prototypes are empirical already), train.accumulate "
    "> 1, the shuffled sampler, VPL with gradient=batch",
)
QAPM = replace(
    PROTOTYPE_MEMORY,
    title="Quality-Aware Prototype Memory: soft recognizability",
    formula="p_c = norm(Σ q_j x_j / Σ q_j), q_j = clamp(1 − cos(x_j, u), 0, 1), u: running mean of unrecognizable images",
    state=PROTOTYPE_MEMORY.state + "; u [D], the same on every rank",
    communication="one all-reduce of D numbers (u); 16 more images are encoded per step, over all ranks",
    source="Smirnov et al. 2023, arXiv 2311.07734; 1 − cos as the score: Deng et al. 2021 (ERS), arXiv 2106.04112",
    published="the weighted mean, and a prototype of the unrecognizable (from a summary of the paper); no code is known to us",
    ours=PROTOTYPE_MEMORY.ours + "; u from destroyed copies of batch images, decay 0.9; equal weights for the first 2 % "
    "of steps",
    deviations="every open reading is a key of quality: estimator, usage, power, warmup, unrecognizable.source, pinned",
    goes_with=PROTOTYPE_MEMORY.goes_with + "; every quality.estimator with every quality.usage",
)
QAPM_NORM = replace(
    QAPM,
    title="Quality-Aware Prototype Memory: norm",
    formula="p_c = norm(Σ q_j x_j / Σ q_j), q_j = a_j / max a",
    state=PROTOTYPE_MEMORY.state,
    communication=NOTHING,
    source="Smirnov et al. 2023, arXiv 2311.07734",
    published="the norm over the largest norm as quality (from a summary of the paper); the largest cancels in the mean",
    ours=PROTOTYPE_MEMORY.ours + "; means of unit embeddings, so that norms count once; equal weights for the first 2 % "
    "of steps",
    deviations="prototypes.memory.average=raw would let the norm count twice",
)
QAPM_HARD = replace(
    QAPM,
    title="Quality-Aware Prototype Memory: hard recognizability",
    formula="p_c = norm(Σ q_j x_j / Σ q_j), q_j = 1 if 1 − cos(x_j, u) ≥ τ, else 0; all rejected: equal weights",
    ours=QAPM.ours + "; τ is the 10 % quantile of each batch: no threshold is published",
    deviations="quality.threshold or quantile, quality.on_empty (equal, best, skip)",
)
QAPM_EXTERNAL = replace(
    QAPM,
    title="Quality-Aware Prototype Memory: scores from outside",
    formula="p_c = norm(Σ q_j x_j / Σ q_j), q_j from train.<column>.npy beside the data",
    state=PROTOTYPE_MEMORY.state,
    communication="one number for each image, with the labels",
    source="Smirnov et al. 2023, arXiv 2311.07734 (several ways to estimate quality; this form is our reading)",
    ours=PROTOTYPE_MEMORY.ours + "; equal weights for the first 2 % of steps",
    deviations="the scale of the scores cancels in the mean, but for the least weight, quality.minimum; negative ones are refused",
)

MAGFACE = replace(
    PLAIN,
    title="MagFace",
    formula="z_y = s·cos(θ_y + m(a)), m(a) a line from (l, m_l) to (u, m_u), a clamped to [l, u]; L = mean CE + λ·mean "
    "g(a), g(a) = a/u² + 1/a",
    communication="nothing in a step: the margin needs the norm where the class lives, and norms come with the gathered "
    "embeddings; their gradient goes to the own rows. One number for the loss that is reported",
    source="Meng et al. 2021 (CVPR), MagFace; settings of the authors' script (github IrvingMeng/MagFace, run.sh)",
    published="l, u = 10, 110; margins 0.45, 0.8; λ = 35, s = 64; no margin where cos θ ≤ 0 (beyond_pi: easy); last "
    "BatchNorm with a learned weight, dropout 0.4; batch 512, lr 0.1, 25 epochs, ×0.1 at 10, 18, 22",
    ours="λ, margins and range as published; regulariser over the images of the whole batch",
    deviations="λ must be at least s·k·u²l²/(u² − l²) (22.59 here) or norms collapse; the code's other default, 20, is "
    "below it and is refused. The published parallel code loses the norm's gradient where the class lives on another "
    "rank, and divides the encoder's gradient by the number of ranks; here both are exact",
    goes_with="every source of prototypes, contrast, quality.estimator=magface; refused: encoder.last_bn=frozen (pins the "
    "norm), margin.gradient=straight_through (the margin would not reach the norm), λ below the bound, quality.loss_weight",
)
MAGFACE_COSFACE = replace(
    MAGFACE,
    title="MagFace in the form of CosFace",
    formula="z_y = s·(cos θ_y − m(a)), m(a) and the regulariser as in magface",
    source="Meng et al. 2021 (CVPR), MagFace; settings of the authors' second script (run_dist_cos.sh)",
    published="l, u = 10, 110; lower margin 0.35; λ = 150, s = 64; last BatchNorm with a learned weight, dropout 0.4",
    ours="upper margin 0.8, the value with which the bound on λ comes to 29.04",
    deviations="λ must be at least s·k·u²l²/(u² − l²), 29.04 here; see magface for the parallel code",
)

VPL_ARCFACE = replace(
    PLAIN,
    title="VPL with ArcFace",
    formula="prototype j counts as norm((1 − λ_j)·norm(W_j) + λ_j·Q_j), Q_j the last unit feature of identity j, λ_j = λ "
    "if it is at most Δ steps old and the start is past, else 0; then ArcFace",
    state=ROWS + "; Q_j [D] and the step in which it was seen, split like W",
    communication="nothing; with injection.key_encoder the gather of its features, B×D",
    source="Deng et al. 2021 (CVPR), Variational Prototype Learning; code in insightface (recognition/vpl)",
    published="λ = 0.15, Δ = 200 steps, from step 8000, ArcFace 0.5 with its true derivative, no averaged encoder (the "
    "code has one as an option, 0.999)",
    ours="of several images of an identity in a batch the last one in the global order is kept; Δ may also be a share of "
    "the identities (passes, coverage)",
    deviations="Δ counts steps, so that with 3 million identities some 4 % are injected at a time (an issue of the code's "
    "users): prototypes.injection.passes and coverage. A user's re-run reports no gain: 96.66 against 96.79 on IJB-C",
    goes_with="every margin, sampled prototypes (ours; the code refuses them), memory (ours), EPL, contrast; refused: "
    "memory with gradient=batch, key_encoder with EPL's update=after, a start after the end of the run",
)
VPL_COSFACE = replace(
    VPL_ARCFACE,
    title="VPL with CosFace",
    formula=VPL_ARCFACE.formula.replace("ArcFace", "CosFace"),
    published=VPL_ARCFACE.published.replace("ArcFace 0.5 with its true derivative", "CosFace 0.35 in the paper's table, 0.4 in the code"),
    ours=VPL_ARCFACE.ours + "; CosFace 0.35",
)

EPL_COSFACE = replace(
    PLAIN,
    title="EPL with CosFace",
    formula="L = ½ CE(x, W; CosFace) + ½ CE(x, E), target of the second: value (1 − k)·e, derivative that of e = cos(x, "
    "E_y); E_y ← norm(α·E_y + (1 − α)·x), α = softsign(cos(x, E_y))",
    state=ROWS + "; E_j [D] and whether it was seen, split like W, without gradient or momentum",
    communication="the reductions of B numbers a second time, for the second term",
    source="Fan et al. 2024, Empirical Prototype Learning, arXiv 2405.12447 (abstract; the formulas are the code's: "
    "github WakingHours-GitHub/EPL)",
    published="k = 0.7, softsign, E updated before the loss, second term from the 4th epoch; m = 0.4, s = 64; batch 512, "
    "lr 0.1, 28 epochs, dropout 0.4",
    ours="E is empty until an identity is seen (the code starts with random rows); of several images of an identity the "
    "last one in the global order counts",
    deviations="updated before the loss, an image is in the prototype it is compared with: e is at least 0.94 whatever it "
    "was, and the margin nearly constant (0.66 to 0.70). The paper's reading: empirical.update=after, "
    "coefficient=sigmoid. A second summary of the margin (s/64) contradicts the code [not verified]",
    goes_with="every margin, classifier and sampled prototypes, VPL, contrast, the unified criterion; refused: memory, "
    "update=before with train.accumulate > 1, stacked with margin.name=softmax",
)
EPL_ARCFACE = replace(
    EPL_COSFACE,
    title="EPL with ArcFace",
    formula=EPL_COSFACE.formula.replace("CosFace", "ArcFace") + "; the ArcFace margin comes on top in both halves (stacked)",
    published="k = 0.7, softsign, E updated before the loss, second term from the 4th epoch; ArcFace 0.4 with derivative "
    "1 (straight_through), also in the second term (stacked), s = 64",
    deviations=EPL_COSFACE.deviations + ". Only the code's ArcFace and UniFace heads stack the margins: empirical.stacked",
)
UNIFACE = replace(
    PLAIN,
    title="UniFace (unified cross-entropy)",
    formula="L = softplus(−(z_y − b)) + l·Σ_{j≠y} softplus(z_j − b), z_y = s·(cos θ_y − m), one learned threshold b",
    state=ROWS + "; b, one number, the same on every rank",
    communication="nothing more: a sum takes the place of maximum and log-sum-exp; the gradient of b is the same on every rank",
    source="Zhou et al. 2023 (ICCV), UniFace; values from the UniFace head of EPL's code and TFace",
    published="b starts at log(10·C), l = 1, m = 0.4, s = 64; negatives sampled, gradients clipped at 10",
    ours="b learns at the prototypes' rate, without decay; no clamp of the logits; sampling and clipping are switches",
    deviations="the code clamps z − b, beyond which nothing has a gradient; here nothing is clamped. "
    "prototypes.source=sampled and optimizer.clip=10 for the authors' sampling and clipping",
    goes_with="every margin, every source of prototypes, contrast",
)
EPL_UNIFACE = replace(
    EPL_COSFACE,
    title="EPL with UniFace",
    formula="the mean of UniFace's loss over W and over E, with one threshold b; both with the margin of CosFace, the "
    "second on top of k·e (stacked)",
    state=EPL_COSFACE.state + "; b, one number, the same on every rank",
    published="k = 0.7, softsign, E updated before the loss, second term from the 4th epoch; m = 0.4, b starts at "
    "log(10·C), l = 1",
    deviations=EPL_ARCFACE.deviations,
)

COREFACE = replace(
    PLAIN,
    title="CoReFace",
    formula="L = ½ CE(x¹) + ½ CE(x²) + w·CE(t·(C − m·I)), C_ij = cos(x¹_i, x²_j) between two dropout views, C_ij = 0 for "
    "other images of the same identity; m ← 0.99·mean(C_ii − hardest negative) + 0.01·m",
    state=ROWS + "; m, one number, the same on every rank",
    communication="the second view in the gather, B×D, and in the reductions, B numbers; one number for m and one for the loss "
    "that is reported; nothing more with negatives=global",
    source="Song and Wang 2023, CoReFace, arXiv 2304.11668; code: github IsidoreSong/CoreFace, where it is called ContraFace",
    published="ArcFace 0.5, s = 64; w = 0.05, t = 64; one view and dropout 0.4 for 7 epochs, then dropout 0.6; gradient "
    "clip 5; MS1MV2, batch 512, lr 0.1, ×0.1 at 8, 14, 20 of 24 to 26 epochs",
    ours="one run with both phases (the released model went on from another run); m over all ranks and saved (theirs: per "
    "rank, lost at a restart)",
    deviations="the new value of m counts 0.99, hardly a running mean: contrast.momentum. Twins stay in the sum with e⁰: "
    "contrast.mask. Theirs clips the encoder's gradient alone, ours with the prototypes'. The published row takes the "
    "best checkpoint of each benchmark; their best single one has a mean of 97.22, not 97.25",
    goes_with="every margin and source of prototypes (a memory makes its prototypes of the first view: ours); refused: "
    "train.accumulate > 1, contrast.dropout=0, encoder.dropout with start_epoch=0",
)

MAGFACE_QAPM_VPL = replace(
    QAPM,
    title="MagFace, quality-aware memory and VPL (ours, unpublished)",
    formula="p_c = norm(Σ q_j x_j / Σ q_j), q_j = (a_j clamped to [l, u] − l)/(u − l); rows count as norm((1 − λ)·p + "
    "λ·Q); then MagFace",
    state=PROTOTYPE_MEMORY.state + "; the last feature of each stored identity",
    communication=MAGFACE.communication,
    source="ours, unpublished; parts: MagFace, Quality-Aware Prototype Memory: VPL",
    published="nothing; λ = 0.15 and MagFace's numbers are those of their papers",
    ours="the combination, and all that prototype_memory leaves open; no result is known",
    deviations="for plain means: quality.estimator=equal; without injection: prototypes.injection.weight=0",
    goes_with="contrast; refused: what magface and prototype_memory refuse, memory.gradient=batch",
)
COREFACE_EPL = replace(
    EPL_COSFACE,
    title="EPL with CoReFace's contrast (ours, unpublished)",
    formula="EPL's two terms, each the mean over two dropout views, + w·contrast of the views; E follows the first view",
    state=EPL_COSFACE.state + "; the contrast's m, one number",
    communication="the second view in the gather, B×D; the reductions for two views and two terms, 4·B numbers in place of B; "
    "two numbers as in coreface",
    source="ours, unpublished; parts: EPL, CoReFace",
    published="nothing; k, w, softsign, CosFace 0.4 and the dropouts are those of their codes, E is updated after the loss as EPL's "
    "paper says",
    ours="the combination; no result is known",
    deviations="those of epl_cosface and coreface, by the same switches",
    goes_with="every margin, classifier and sampled prototypes, VPL; refused: what epl_cosface and coreface refuse",
)

RECIPES = {
    "softmax": SOFTMAX,
    "cosface": COSFACE,
    "arcface": ARCFACE,
    "arcface_insightface": ARCFACE_INSIGHTFACE,
    "combined": COMBINED,
    "magface": MAGFACE,
    "magface_cosface": MAGFACE_COSFACE,
    "uniface": UNIFACE,
    "partial_fc": PARTIAL_FC,
    "subcenter_arcface": SUBCENTER_ARCFACE,
    "prototype_memory": PROTOTYPE_MEMORY,
    "quality_aware_prototype_memory": QAPM,
    "quality_aware_prototype_memory_norm": QAPM_NORM,
    "quality_aware_prototype_memory_hard": QAPM_HARD,
    "quality_aware_prototype_memory_external": QAPM_EXTERNAL,
    "vpl_arcface": VPL_ARCFACE,
    "vpl_cosface": VPL_COSFACE,
    "epl_cosface": EPL_COSFACE,
    "epl_arcface": EPL_ARCFACE,
    "epl_uniface": EPL_UNIFACE,
    "coreface": COREFACE,
    "magface_qapm_vpl": MAGFACE_QAPM_VPL,
    "coreface_epl": COREFACE_EPL,
}
