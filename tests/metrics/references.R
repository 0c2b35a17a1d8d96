# Reference values of the tests: Rscript tests/metrics/references.R openreml_nn/data/tables
# Fits by lme4; shares, ratios, their delta method and heritabilities in base R, from the formulas. Printed with
# R 4.2.2 and lme4 1.1-31, the optimizer's tolerance tightened.
suppressMessages(library(lme4))
options(digits = 15)
tables <- commandArgs(TRUE)[1]
read <- function(name) read.csv(file.path(tables, paste0(name, ".csv")), stringsAsFactors = TRUE)
fit <- function(...) lmer(..., control = lmerControl("bobyqa", optCtrl = list(rhoend = 1e-10)))

# R2 and ICC: variance of the fixed part, mean of z'Gz over rows, residual variance
shares <- function(m) {
  Z <- as.matrix(getME(m, "Z"))
  G <- sigma(m)^2 * as.matrix(crossprod(getME(m, "Lambdat")))
  f <- var(as.vector(model.matrix(m) %*% fixef(m)))
  r <- mean(rowSums((Z %*% G) * Z))
  e <- sigma(m)^2
  c(marginal = f / (f + r + e), conditional = (f + r) / (f + r + e), icc = r / (r + e))
}

# covariance of s in V = sum of s_k V_k: the inverse average information
covariance <- function(y, X, parts, s) {
  Vi <- solve(Reduce(`+`, Map(`*`, parts, s)))
  P <- Vi - Vi %*% X %*% solve(t(X) %*% Vi %*% X, t(X) %*% Vi)
  W <- sapply(parts, function(D) D %*% P %*% y)
  solve(0.5 * t(W) %*% P %*% W)
}
ratio <- function(s, C, a, b) {
  g <- a / sum(b * s) - sum(a * s) * b / sum(b * s)^2
  c(value = sum(a * s) / sum(b * s), se = sqrt(drop(t(g) %*% C %*% g)))
}

sleep <- read("sleepstudy")
print(shares(fit(Reaction ~ Days + (1 | Subject), sleep)))
m <- fit(Reaction ~ Days + (Days | Subject), sleep)
print(shares(m))
G <- VarCorr(m)$Subject
s <- c(G[1, 1], G[1, 2], G[2, 2], sigma(m)^2)
same <- tcrossprod(model.matrix(~ 0 + Subject, sleep))
d <- sleep$Days
parts <- list(same, same * outer(d, d, `+`), same * outer(d, d), diag(nrow(sleep)))
C <- covariance(sleep$Reaction, model.matrix(m), parts, s)
print(ratio(s, C, c(1, 2 * mean(d), mean(d^2), 0), c(1, 2 * mean(d), mean(d^2), 1)))

alpha <- read("john_alpha")
m <- fit(yield ~ rep + (1 | gen) + (1 | rep:block), alpha)
print(shares(m))
s <- c(VarCorr(m)$gen, VarCorr(m)$`rep:block`, sigma(m)^2)
Z <- model.matrix(~ 0 + gen, alpha)
B <- model.matrix(~ 0 + rep:block, alpha)
parts <- list(tcrossprod(Z), tcrossprod(B), diag(nrow(alpha)))
X <- model.matrix(~ rep, alpha)
C <- covariance(alpha$yield, X, parts, s)
print(ratio(s, C, c(1, 0, 0), c(1, 0, 1)))
print(ratio(s, C, c(1, 0, 0), c(1, 0, 1 / 3)))

# variance of each difference of two BLUPs, and of two adjusted means, averaged over the pairs
difference <- function(C) mean(combn(ncol(C), 2, function(p) C[p[1], p[1]] + C[p[2], p[2]] - 2 * C[p[1], p[2]]))
Vi <- solve(Reduce(`+`, Map(`*`, parts, s)))
P <- Vi - Vi %*% X %*% solve(t(X) %*% Vi %*% X, t(X) %*% Vi)
pev <- s[1] * diag(ncol(Z)) - s[1]^2 * t(Z) %*% P %*% Z
print(c(difference(pev), cullis = 1 - difference(pev) / (2 * s[1])))
means <- as.matrix(vcov(fit(yield ~ 0 + gen + rep + (1 | rep:block), alpha)))[1:24, 1:24]
print(c(difference(means), piepho = s[1] / (s[1] + difference(means) / 2)))
