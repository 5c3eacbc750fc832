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
        lookback=None,
        eps=1e-6,
        alpha_down=None,
        skip_update_on_spike=False,
        z_skip=None,
        patience=None,
    ):
        self.alpha, self.mode, self.clip_option, self.clip_factor = alpha, mode, clip_option, clip_factor
        self.z_thresh = z_thresh if percentile is None else NormalDist().inv_cdf(percentile)
        self.max_grad_norm, self.warmup_steps, self.eps = max_grad_norm, warmup_steps, eps
        self.skip_update_on_spike, self.patience = skip_update_on_spike, patience
        self.alpha_down, self.z_skip, self.lookback = alpha_down, z_skip, lookback
        self.seen = 0  # norms before this one
        self.warmup_norms = []
        self.mean = self.var = 0.0
        self.streak = self.spike_steps = 0
        self.spike = self.skip = False

    def step(self, norm):
        self.spike = self.skip = False
        if norm == 0 or not math.isfinite(norm * norm):
            return norm
        clipped = self.decide(norm)
        self.seen += 1
        return self.cap(clipped)

    def decide(self, norm):
        if self.seen < self.warmup_steps:
            self.warm_up(norm) if self.lookback is None else self.look_back(norm)
            return norm
        sigma = math.sqrt(self.var)
        z = (norm - self.mean) / (sigma + self.eps * self.mean)
        self.spike = z > self.z_thresh
        if not self.spike:
            self.streak = 0
            self.feed(norm)
            return norm
        clipped = min(norm, self.threshold(z, sigma))
        self.skip = self.z_skip is not None and z > self.z_skip and self.streak < 3
        self.spike_steps += 1
        self.learn_from_spike(min(norm, self.mean + self.z_thresh * sigma) if self.is_common() else clipped, sigma)
        self.streak += 1
        return clipped

    def warm_up(self, norm):
        self.warmup_norms.append(norm)
        n = len(self.warmup_norms) - 1  # norms seen before
        if self.alpha_down is None:
            self.mean, self.var = fmean(self.warmup_norms), pvariance(self.warmup_norms)
            return
        keep = n / (n + 1)
        old_mean = self.mean
        self.mean += (1 - (keep if norm >= self.mean else min(keep, self.alpha_down))) * (norm - self.mean)
        self.var = keep * self.var + (1 - keep) * (norm - old_mean) * (norm - self.mean)

    def learn_from_spike(self, clipped, sigma):
        if self.patience is not None and self.streak >= self.patience:
            self.mean *= 2 ** (1 / 1000)
            self.var = (sigma * 2 ** (1 / 1000)) ** 2
        elif not self.skip_update_on_spike:
            self.feed(clipped)
            if self.patience is not None and self.streak >= 10:
                self.var = max(self.var, sigma**2)

    def threshold(self, z, sigma):
        if self.mode == "percentile" or self.clip_option == "max":
            return self.mean + self.z_thresh * sigma
        if self.clip_option == "mean":
            return self.mean
        return self.mean + self.clip_factor * (self.z_thresh**2 / z) * sigma

    def looking_back(self):
        if self.lookback is None:
            return None
        keep = self.lookback * self.seen / (1 + self.lookback * self.seen)
        return keep if keep < self.alpha else None

    def is_common(self):
        return self.looking_back() is not None and self.spike_steps > (self.seen - self.warmup_steps + 11) / 5

    def look_back(self, norm):
        keep = self.looking_back()
        if keep is None:
            self.feed(norm)
            return
        keep_mean = keep if norm >= self.mean or self.alpha_down is None else min(keep, self.alpha_down)
        old_mean = self.mean
        self.mean = old_mean + (1 - keep_mean) * (norm - old_mean)
        self.var = keep * self.var + (1 - keep) * (norm - old_mean) * (norm - self.mean)

    def feed(self, norm):
        if self.looking_back() is not None:
            self.look_back(norm)
            return
        keep = self.alpha if norm >= self.mean or self.alpha_down is None else self.alpha_down
        self.mean = keep * self.mean + (1 - keep) * norm
        self.var = self.alpha * self.var + (1 - self.alpha) * (norm - self.mean) ** 2

    def cap(self, norm):
        return norm if self.max_grad_norm is None else min(norm, self.max_grad_norm)
