# Fit one workload with lme4 or nlme in this process, several times, and report it, as runner.py does.
#
#     Rscript fit.R PROGRAM FOLDER REPEATS
#
# FOLDER holds table.csv and data.json and gets result.json. Needs lme4 or nlme, and nothing else.

LONG <- 25  # seconds; a longer fit is not repeated
given <- commandArgs(trailingOnly = TRUE)
program <- given[1]; folder <- given[2]; repeats <- as.integer(given[3])

quoted <- function(text) {
  clean <- gsub("[^ -~]", "?", gsub("[\r\n\t]+", " ", text))
  paste0("\"", gsub("([\"\\\\])", "\\\\\\1", clean), "\"")
}
number <- function(x) ifelse(is.finite(x), sprintf("%.17g", x), "NaN")
report <- function(fields) {
  body <- paste0(vapply(names(fields), quoted, ""), ": ", unlist(fields), collapse = ", ")
  writeLines(paste0("{", body, "}"), file.path(folder, "result.json"))
  quit(save = "no")
}
out <- list(program = quoted(program))
package <- sub(",.*", "", program)
if (!requireNamespace(package, quietly = TRUE)) {
  report(c(out, missing = quoted(paste("R has no package", package))))
}
out$version <- quoted(as.character(packageVersion(package)))

about <- paste(readLines(file.path(folder, "data.json"), warn = FALSE), collapse = " ")
workload <- sub(".*\"workload\": \"([^\"]+)\".*", "\\1", about)
table <- read.csv(file.path(folder, "table.csv"))
factors <- intersect(c("service", "dept", "s", "d", "subject", "gen", "rep", "rep_block"), names(table))
table[factors] <- lapply(table[factors], factor)

lmer_formulas <- list(
  insteval = y ~ service + (1 | s) + (1 | d),
  insteval_dept = y ~ service * dept + (1 | s) + (1 | d),
  million = y ~ x + (1 + x | subject),
  alpha = y ~ rep + (1 | gen) + (1 | rep_block)
)

lmer_formulas[c("trials", "trials24")] <- lmer_formulas["alpha"]

fit_lme4 <- function() lme4::lmer(lmer_formulas[[workload]], table)
told_lme4 <- function(fitted) {
  rows <- as.data.frame(lme4::VarCorr(fitted))
  variances <- setNames(rows$vcov, ifelse(rows$grp == "rep_block", "rep:block", rows$grp))
  if (workload == "million") {
    names(variances) <- c("intercept", "slope", "covariance", "residual")
  }
  names(variances)[rows$grp == "Residual"] <- "residual"
  list(variances = variances, loglik = as.numeric(logLik(fitted)), iterations = fitted@optinfo$feval)
}

fit_nlme <- function() {
  nlme::lme(y ~ time, table, random = ~ 1 | subject, correlation = nlme::corAR1(form = ~ time | subject))
}
told_nlme <- function(fitted) {
  rho <- coef(fitted$modelStruct$corStruct, unconstrained = FALSE)
  variances <- c(intercept = unname(nlme::getVarCov(fitted)[1, 1]), sigma2 = fitted$sigma^2, rho = unname(rho))
  list(variances = variances, loglik = as.numeric(logLik(fitted)), iterations = -1)
}

fit <- if (package == "lme4") fit_lme4 else fit_nlme
told <- if (package == "lme4") told_lme4 else told_nlme
status <- function(field) {
  lines <- tryCatch(readLines("/proc/self/status"), error = function(e) character())
  line <- grep(paste0("^", field, ":"), lines, value = TRUE)
  if (length(line)) as.numeric(gsub("[^0-9]", "", line)) / 1024 else NaN
}

outcome <- tryCatch({
  try(writeLines("5", "/proc/self/clear_refs"), silent = TRUE)
  before <- status("VmRSS")
  seconds <- numeric()
  for (turn in 0:repeats) {
    elapsed <- system.time(fitted <- suppressWarnings(suppressMessages(fit())))[["elapsed"]]
    if (turn > 0 || elapsed > LONG) seconds <- c(seconds, elapsed)
    if (elapsed > LONG) break
  }
  peak <- status("VmHWM")
  result <- told(fitted)
  pairs <- paste0(vapply(names(result$variances), quoted, ""), ": ", number(result$variances), collapse = ", ")
  list(
    seconds = paste0("[", paste(number(seconds), collapse = ", "), "]"),
    variances = paste0("{", pairs, "}"), loglik = number(result$loglik), iterations = number(result$iterations),
    peak = number(peak), above = number(peak - before),
    note = quoted(paste0("R ", getRversion(), if (grepl("openblas", La_library())) ", OpenBLAS" else ", another BLAS"))
  )
}, error = function(e) list(failed = quoted(conditionMessage(e))))
report(c(out, outcome))
