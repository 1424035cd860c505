"01_surrogate made false."
from falsifications import Falsified

FALSE = [
    Falsified("the logistic's derivative is a tenth too large",
              find="logistic.d", replace=lambda d: lambda self, t: 1.1 * d(self, t),
              caught="phi.d(x) - autograd_d(phi, x)"),
    Falsified("the root bound without its 2",
              find="bound = (2 * logistic_regret(P, E, f)).sqrt()",
              replace="bound = logistic_regret(P, E, f).sqrt()",
              caught="auc_regret(P, E, f) <= bound"),
]
