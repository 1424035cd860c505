"CAPO, Calibration-Aware Policy Optimization for reasoning LLMs (arXiv 2604.12632): the pure core, only torch."
__version__ = "0.3.0"

from .calibration import auc, auc_mean, group_auc, group_index, pair_auc, pooled_auc
from .surrogate import Surrogate, exponential, hinge, linear, logistic, squared_hinge
from .logprob import mean_logp, perplexity, token_logps
from .grpo import clip_fraction, clipped_loss, grpo_advantage
from .advantage import batch_advantage, capo_advantage, flat_advantage, pairwise_advantage, pairwise_loss
from .mask import noise_mask, quantile_thresholds

__all__ = ["auc", "auc_mean", "group_auc", "group_index", "pair_auc", "pooled_auc", "Surrogate", "exponential",
           "hinge", "linear", "logistic", "squared_hinge", "mean_logp", "perplexity", "token_logps", "clip_fraction",
           "clipped_loss", "grpo_advantage", "batch_advantage", "capo_advantage", "flat_advantage", "pairwise_advantage",
           "pairwise_loss", "noise_mask", "quantile_thresholds"]
