#define BITPRESS_PATH avx2
#include "kernels.inc"

namespace bitpress {

const Kernels *avx2_kernels() {
#if defined(__AVX2__)
    static const Kernels table = avx2::table_of("avx2");
    static const bool there =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return there ? &table : nullptr;
#else
    return nullptr;
#endif
}

}  // namespace bitpress
