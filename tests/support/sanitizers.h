// Tells the build that sanitizers watch from the one that users run.
#ifndef SLUICE_TESTS_SUPPORT_SANITIZERS_H_
#define SLUICE_TESTS_SUPPORT_SANITIZERS_H_

namespace sluice::testing {

// Everything takes five to ten times as long under sanitizers, and what they look for shows in any
// part of the input: a test of very many inputs may take fewer there. Without them it takes all.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

}  // namespace sluice::testing

#endif  // SLUICE_TESTS_SUPPORT_SANITIZERS_H_
