// Runs a check on every instruction set that the kernels were compiled for and this machine has.
#ifndef SLUICE_TESTS_SUPPORT_INSTRUCTION_SETS_H_
#define SLUICE_TESTS_SUPPORT_INSTRUCTION_SETS_H_

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <cstdint>

namespace sluice::testing {

// Failures name the instruction set; afterwards the best one is in use again.
template <typename Check>
void OnEveryInstructionSet(const Check& check) {
  const int64_t supported = hwy::SupportedTargets();
  EXPECT_NE(supported, 0);
  for (int64_t targets = supported; targets != 0; targets &= targets - 1) {
    const int64_t target = targets & -targets;
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(target);
    SCOPED_TRACE(hwy::TargetName(target));
    check();
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().DeInit();
}

}  // namespace sluice::testing

#endif  // SLUICE_TESTS_SUPPORT_INSTRUCTION_SETS_H_
