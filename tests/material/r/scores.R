# Scores of untied.csv and tied.csv by R's survival package, for tests/survival/test_r.py.
# Rscript scores.R prints a name and its figures per line. Figures in the test: R 4.2, survival 3.5-3.
library(survival)
here <- dirname(sub("--file=", "", grep("--file=", commandArgs(), value = TRUE)))
out <- function(name, x) cat(name, format(x, digits = 12), "\n")
for (k in c("untied", "tied")) {
  d <- read.csv(file.path(here, paste0(k, ".csv"))); n <- nrow(d); S <- with(d, Surv(time, event))
  cat("##", k, "\n")
  out("harrell", concordance(S ~ risk, d, reverse = TRUE)$concordance)
  # Censoring distribution: a censoring at the time of an event comes after it, so censorings are moved by 1e-4.
  G <- survfit(Surv(time + ifelse(event == 1, 0, 1e-4), 1 - event) ~ 1, d)
  before <- stepfun(G$time, c(1, G$surv))           # before(t) = G(t-), before(t + 2e-4) = G(t)
  limit <- round(max(G$time[G$surv >= .1]), 3)
  out("uno", concordance(S ~ risk, d, reverse = TRUE, timewt = "n/G2", ymax = limit - 1e-6)$concordance)
  for (m in c(6, 12)) {
    case <- d$event == 1 & d$time <= m; control <- pmin(d$time, limit) > m; w <- 1 / before(d$time[case])
    wins <- outer(d$risk[case], d$risk[control], ">") + .5 * outer(d$risk[case], d$risk[control], "==")
    out(paste0("auc_", m), sum(w * rowSums(wins)) / (sum(w) * sum(control)))
  }
  survival <- function(m) exp(-exp(d$risk) * m / 30)
  brier <- function(m) mean(ifelse(d$event == 1 & d$time <= m, survival(m)^2 / before(d$time), 0) +
                            ifelse(d$time > m, (1 - survival(m))^2 / before(m + 2e-4), 0))
  times <- seq(3, 12, length.out = 30); b <- sapply(times, brier)
  out("ibs", sum(diff(times) * (head(b, -1) + tail(b, -1)) / 2) / 9)
  high <- d$risk >= median(d$risk); fold <- (seq_len(n) - 1) %% 3
  for (ties in c("efron", "breslow")) {
    f <- coxph(S ~ high + strata(fold), ties = ties); out(paste0("cox_high_by_fold_", ties), c(coef(f), sqrt(vcov(f))))
  }
  # Of strata: the partial likelihood of fixed risks, and the C of pairs within strata.
  out("partial_likelihood_by_fold", coxph(S ~ offset(risk) + strata(fold), d, ties = "efron")$loglik[1])
  out("harrell_by_fold", concordance(S ~ risk + strata(fold), d, reverse = TRUE)$concordance)
  f <- coxph(S ~ risk, d, ties = "efron"); out("cox_risk_efron", c(coef(f), sqrt(vcov(f))))
  out("log_rank_by_fold", survdiff(S ~ high + strata(fold))$pvalue)
  km <- summary(survfit(S ~ 1, conf.type = "log-log"), times = 9); out("kaplan_meier_9", c(km$surv, km$lower, km$upper))
  # Calibration at 9 months of a model that expects twice the cumulative hazard.
  p <- survival(9)^2; H <- 2 * exp(d$risk) * d$time / 30
  out("observed_expected_9", (1 - c(km$surv, km$upper, km$lower)) / mean(1 - p))
  g <- glm(event ~ offset(log(H)), poisson, d, epsilon = 1e-12); out("intercept", c(coef(g), sqrt(vcov(g))))
  x <- log(-log(p)); q <- quantile(x, c(.1, .5, .9)); cube <- function(a) pmax(x - a, 0)^3
  bend <- (cube(q[1]) - (cube(q[2]) * (q[3] - q[1]) - cube(q[3]) * (q[2] - q[1])) / (q[3] - q[2])) / (q[3] - q[1])^2
  # Breslow's baseline, which the program uses with Efron's coefficients.
  f <- coxph(S ~ x + bend, ties = "efron"); e <- exp(cbind(x, bend) %*% coef(f))
  t <- sort(unique(d$time[d$event == 1 & d$time <= 9]))
  base <- sum(sapply(t, function(u) sum(d$event == 1 & d$time == u) / sum(e[d$time >= u])))
  out("ici_9", mean(abs(exp(-base * e) - p)))
  f <- coxph(S ~ x + strata(fold), ties = "efron"); out("slope", c(coef(f), sqrt(vcov(f))))
}
