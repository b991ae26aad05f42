#ifndef SLUICE_RUNTIME_THREAD_NAME_H_
#define SLUICE_RUNTIME_THREAD_NAME_H_

#include <pthread.h>

namespace sluice {

// What `top -H` and debuggers call the calling thread; threads that it starts inherit it. name: at
// most 15 characters, else nothing changes.
inline void NameThread(const char* name) { pthread_setname_np(pthread_self(), name); }

}  // namespace sluice

#endif  // SLUICE_RUNTIME_THREAD_NAME_H_
