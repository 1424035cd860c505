"00_calibration made false."
from falsifications import Falsified

FALSE = [
    Falsified("a tie counts one",
              find="+ (margin == 0) / 2).mean()",
              replace="+ (margin == 0)).mean()",
              caught="test_close(auc(s, c), naive_auc(s, c)"),
    Falsified("ranks forget ties",
              find="for side in (False, True))",
              replace="for side in (False, False))",
              caught="test_close(auc(s, c), naive_auc(s, c)"),
]
