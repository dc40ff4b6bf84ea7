#define BITPRESS_PATH portable
#include "kernels.inc"

namespace bitpress {

const Kernels &portable_kernels() {
    static const Kernels table = portable::table_of("portable");
    return table;
}

}  // namespace bitpress
