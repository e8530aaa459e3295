// What tests tell the shim.
#include "host_shim/cuda_host_shim.h"

// Threads of a block run from first to last, or the other way round with asynchronous copies that happen at once: a
// missing barrier shows in one of the two.
extern "C" __attribute__((visibility("default"))) void titan_shim_reverse_order(int reverse) {
  cushim::reverse_order = reverse != 0;
}
