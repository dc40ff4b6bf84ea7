#define BITPRESS_PATH avx512
#include "kernels.inc"

namespace bitpress {

const Kernels *avx512_kernels() {
#if defined(__AVX512VNNI__)
    static const Kernels table = avx512::table_of("avx512");
    static const bool there = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                              __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c");
    return there ? &table : nullptr;
#else
    return nullptr;
#endif
}

}  // namespace bitpress
