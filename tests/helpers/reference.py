"""The oracle: ZClip in plain floats, slow and obvious, written from the paper and the documented behaviour alone."""

import math
from statistics import NormalDist, fmean, pvariance


class ReferenceZClip:
    """Feed it one norm a step; it answers with the norm after clipping and keeps the statistics."""

    def __init__(
        self,
        alpha=0.97,
        z_thresh=2.5,
        mode="zscore",
        clip_option="adaptive_scaling",
        percentile=None,
        clip_factor=1.0,
        max_grad_norm=None,
        warmup_steps=25,
        eps=1e-6,
        skip_update_on_spike=False,
        patience=25,
    ):
        self.alpha, self.mode, self.clip_option, self.clip_factor = alpha, mode, clip_option, clip_factor
        self.z_thresh = z_thresh if percentile is None else NormalDist().inv_cdf(percentile)
        self.max_grad_norm, self.warmup_steps, self.eps = max_grad_norm, warmup_steps, eps
        self.skip_update_on_spike, self.patience = skip_update_on_spike, patience
        self.warmup_norms = []
        self.mean = self.var = 0.0
        self.streak = self.clipped_steps = 0
        self.spike = False

    def step(self, norm):
        self.spike = False
        if norm == 0 or not math.isfinite(norm):
            return norm
        if len(self.warmup_norms) < self.warmup_steps:
            self.warmup_norms.append(norm)
            self.mean, self.var = fmean(self.warmup_norms), pvariance(self.warmup_norms)
            return self.cap(norm)
        sigma = math.sqrt(self.var)
        z = (norm - self.mean) / (sigma + self.eps * self.mean)
        self.spike = z > self.z_thresh
        if not self.spike:
            self.streak = 0
            self.feed(norm)
            return self.cap(norm)
        clipped = min(norm, self.threshold(z, sigma))
        if self.patience is not None and self.streak >= self.patience:
            self.feed(self.mean + self.z_thresh * max(sigma, self.eps * self.mean))
        elif not self.skip_update_on_spike:
            self.feed(clipped)
        self.streak += 1
        self.clipped_steps += 1
        return self.cap(clipped)

    def threshold(self, z, sigma):
        if self.mode == "percentile" or self.clip_option == "max":
            return self.mean + self.z_thresh * sigma
        if self.clip_option == "mean":
            return self.mean
        return self.mean + self.clip_factor * (self.z_thresh**2 / z) * sigma

    def feed(self, norm):
        self.mean = self.alpha * self.mean + (1 - self.alpha) * norm
        self.var = self.alpha * self.var + (1 - self.alpha) * (norm - self.mean) ** 2

    def cap(self, norm):
        return norm if self.max_grad_norm is None else min(norm, self.max_grad_norm)
